"""`diffusers-repr classify`: what it prints and saves, and what it refuses before the work."""

import json

import pytest
import torch
from PIL import Image

from diffusers_repr.cli import main
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.tasks import Racing, ZeroShotClassifier
from tests.testers.models import saved


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classify")
    for at in range(2):
        pixels = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(at))
        Image.fromarray(pixels.numpy()).save(folder / f"{at}.png")
    return folder


def call(photos, *more, model="class_unet"):
    return ["classify", str(saved(model)), str(photos), "--image_size", "16", "24", *more]


def test_classes_as_json_pictures_and_a_classifier(photos, capsys, tmp_path):
    settings = ("--classes", "0", "2", "1", "--rule", "racing", "--error", "0.2", "--seed", "3")
    places = ("--pictures", str(tmp_path / "curves"), "--save", str(tmp_path / "made"))
    assert main(call(photos, *settings, *places, "--json")) == 0
    told = capsys.readouterr()
    rows = [json.loads(line) for line in told.out.splitlines()]
    base = Denoiser.from_pretrained(saved("class_unet"))
    rule = Racing(error=0.2, n_levels=4, max_rounds=25)
    made = ZeroShotClassifier.of(base, [0, 2, 1], rule=rule, image_size=(16, 24), seed=3)
    want = made([Image.open(photos / f"{at}.png") for at in range(2)])
    assert [row["label"] for row in rows] == want.labels
    assert [row["evaluations"] for row in rows] == want.evaluations.tolist()
    assert [row["top"][0]["error"] for row in rows] == pytest.approx(want.errors.amin(1).tolist(), rel=1e-5)
    assert f"{int(want.evaluations.sum())} network evaluations" in told.err
    assert len(list((tmp_path / "curves").glob("*.png"))) == 2
    assert main(["classify", str(tmp_path / "made"), str(photos / "0.png"), "--limit", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] == want.labels[0]
    assert main(["push", str(tmp_path / "made"), "user/made", "--base", "user/base", "--dry_run"]) == 0
    listed = capsys.readouterr().out
    assert "zero_shot.json" in listed
    assert "Nothing was sent" in listed


@pytest.mark.parametrize(
    ("flags", "model", "message"),
    [
        (("--prompts", "a cat", "a cat"), "sd", "twice"),
        (("--prompts", "a cat"), "sd", "two classes or more"),
        (("--prompts", "a cat", "a dog", "--classes", "cat"), "sd", "--prompts are whole"),
        (("--classes", "cat", "dog"), "ddpm", "not conditioned on text or classes"),
        (("--rule", "averaging", "--error", "0.1"), "sd", "--error is of --rule racing"),
        (("--classes", "0", "1", "--rule", "cifar100"), "class_unet", "take one of racing"),
    ],
)
def test_refusals(photos, capsys, flags, model, message):
    assert main(call(photos, *flags, model=model)) == 2
    assert message in capsys.readouterr().err
