import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import load_dataset
from huggingface_hub import ModelCard
from PIL import Image
from train_encoder import main
from transformers import ViTModel

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.variants import image_key
from diffusers_repr.data.views import ViewConfig, ViewData, jitter, luma, random_crop, view
from diffusers_repr.encoders import Encoder
from diffusers_repr.objectives import SelfSupervisedConfig, SimCLRObjective
from diffusers_repr.objectives.self_supervised.simclr import nt_xent
from diffusers_repr.store.image_store import ImageKey, write_images
from diffusers_repr.tasks import EncoderAccuracy
from tests.examples.scripts import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = {
    "image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip
RECIPE = {
    "dataset_name": "digits",
    "eval_split": "validation",
    "model": MODEL,
    "random_rotation": 10.0,
    "crop_scale": 0.5,
    "jitter_probability": 0.5,
    "projection_dim": 8,
    "temperature": 0.2,
    "train_batch_size": 8,
    "max_train_steps": 2,
    "learning_rate": 0.01,
    "ema_max_decay": 0.5,
    "checkpointing_steps": 1,
    "logging_steps": 1,
    "seed": 3,
}


def write_recipe(folder: Path, **changes) -> str:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | changes))
    return str(path)


def launch(config: str, output: Path, *flags: str, processes: int = 1) -> str:
    script = [str(EXAMPLES / "train_encoder.py"), "--config", config, "--output_dir", str(output), *flags]
    options = ["--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", *(["--multi_gpu"] if processes > 1 else [])]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *script]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def fresh_accelerate():
    """Runs in this process leave each other no accelerate state."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


# --- the script


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("encoder")
    flags = ("--config", write_recipe(folder), "--output_dir", str(folder / "out"))
    with warnings.catch_warnings():  # features of two steps are far from separable
        warnings.filterwarnings("ignore", "The logistic regression stopped")
        return folder / "out", run_script(main, "train_encoder", *flags)


def test_the_folder_is_an_encoder(finished):
    output, printed = finished
    encoder = Encoder.from_pretrained(output)
    assert (encoder.channels, encoder.dim, encoder.grid_for((8, 8))) == (1, 16, (4, 4))
    pixels = np.stack([np.array(image) for image in load_images("train")]).astype(np.float64) / 255
    assert encoder.source.mean == pytest.approx([pixels.mean()])
    assert encoder.source.std == pytest.approx([pixels.std(ddof=1)])
    plain, info = ViTModel.from_pretrained(output, add_pooling_layer=False, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = (torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - pixels.mean()) / pixels.std(ddof=1)
    images = inputs * pixels.std(ddof=1) + pixels.mean()
    with torch.no_grad():
        expected = plain.eval()(pixel_values=inputs.float()).last_hidden_state
    out = encoder(images.float().clamp(0, 1))
    torch.testing.assert_close(out.tokens, expected[:, 1:], atol=1e-4, rtol=1e-3)
    assert "trained" in printed


def load_images(split: str) -> list:
    return load_digits_splits()[split]["image"]


def test_metrics_and_card(finished):
    output, _ = finished
    (line,) = (output / "evaluation.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics.pop("step") == 2
    parts = ["trained_class_token", "trained_patch_mean", "untrained_class_token", "untrained_patch_mean", "pixels"]
    assert set(metrics) == {f"{part}_{probe}" for part in parts for probe in ("knn", "linear")}
    assert all(0.1 < score <= 1 for score in metrics.values())
    assert metrics["trained_class_token_linear"] != metrics["untrained_class_token_linear"]
    card = ModelCard((output / "README.md").read_text())
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-feature-extraction"
    assert f"| trained_class_token_knn | {metrics['trained_class_token_knn']:.4g} |" in card.text
    assert "A `ViTModel` of" in card.text
    assert yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])["temperature"] == 0.2


def test_the_same_command_again_goes_on(tmp_path, fresh_accelerate):
    config = write_recipe(tmp_path, eval_split=None)
    whole = ["--config", config, "--output_dir", str(tmp_path / "whole"), "--max_train_steps", "3"]
    main(whole)
    main(["--config", config, "--output_dir", str(tmp_path / "parts"), "--max_train_steps", "1"])
    main(["--config", config, "--output_dir", str(tmp_path / "parts"), "--max_train_steps", "3"])
    one, two = (Encoder.from_pretrained(tmp_path / name) for name in ("whole", "parts"))
    assert one.fingerprint()["weights"] == two.fingerprint()["weights"]
    assert not (tmp_path / "whole" / "evaluation.jsonl").exists()


def test_dry_run_writes_nothing(tmp_path, capsys):
    main(["--config", write_recipe(tmp_path), "--output_dir", str(tmp_path / "out"), "--dry_run", "true"])
    assert "encoder:" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "needs image_size, patch_size, num_channels"),
        ({"model": MODEL | {"patch_size": 3}}, "no multiple of its patch_size"),
        ({"model": MODEL | {"patchsize": 3}}, "Unknown key 'patchsize'.*patch_size"),
        ({"temperature": 0.0}, "must be positive"),
        ({"method": "byol"}, "`temperature` would do nothing: it is of simclr"),
        ({"method": "byol", "temperature": None, "target_decay": 1.5}, r"lies in \[0, 1\]"),
        ({"crop_scale": 0.0}, "share of the area"),
        ({"crop_ratio": 0.5}, "is 1 or more"),
        ({"jitter_probability": 1.5}, r"in \[0, 1\]"),
        ({"grey_probability": 0.2}, "these images are grey"),
        ({"label_column": "none"}, "measures by labels"),
        ({"eval_split": "tset"}, "no split 'tset'"),
        ({"crop": 0.5}, "Unknown key 'crop'"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        main(["--config", write_recipe(tmp_path, **changes), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["encoder_digits", "encoder_cifar10"])
def test_recipes_parse(name, capsys):
    from diffusers_repr.config import parse_recipe
    from diffusers_repr.training import TrainingConfig

    kinds = (TrainingConfig, DataConfig, ViewConfig, SelfSupervisedConfig)
    config, _, _, encoder = parse_recipe(kinds, ["--config", str(EXAMPLES / "configs" / f"{name}.yaml")])
    assert config.max_train_steps > 100
    encoder.build([0.5], [0.5])


@pytest.mark.slow
def test_two_processes_see_all_negatives(tmp_path):
    """Without augmentation two processes of 4 images give the losses of one of 8."""
    plain = {"random_rotation": 0.0, "crop_scale": 1.0, "jitter_probability": 0.0, "eval_split": None}
    config = write_recipe(tmp_path, **plain)
    launch(config, tmp_path / "one", "--train_batch_size", "8")
    launch(config, tmp_path / "two", "--train_batch_size", "4", processes=2)
    one, two = (
        [json.loads(row) for row in (tmp_path / name / "loss.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in two], rel=1e-4)
    assert [a["grad_norm"] for a in one] == pytest.approx([b["grad_norm"] for b in two], rel=1e-3)


@pytest.mark.filterwarnings("ignore:The logistic regression stopped")
def test_the_script_trains_on_variants_and_measures_on_images(tmp_path):
    (tmp_path / "images" / "data").mkdir(parents=True)
    for split in ("train", "test"):
        rows = load_digits_splits()[split]
        labels = rows["label"][:]
        some = sorted(range(len(rows)), key=labels.__getitem__)[::10]  # of each class
        rows.select(some).to_parquet(tmp_path / "images" / "data" / f"{split}-00000-of-00001.parquet")
    pictures = load_dataset(str(tmp_path / "images"), split="train")["image"][:]
    keys = [ImageKey("m", 8, 8, 1, 0, source=f"images/train/{row}#{image_key(np.asarray(pictures[row]))}", variant=v)
            for row in range(len(pictures)) for v in range(2)]  # fmt: skip
    write_images(tmp_path / "variants", keys, lambda asked: [Image.new("L", (8, 8), 101)] * len(asked), progress=False)
    flags = {"dataset_name": tmp_path / "images", "variants_dir": tmp_path / "variants", "eval_split": "test",
             "model": json.dumps(MODEL), "method": "byol", "max_train_steps": 2, "train_batch_size": 8,
             "output_dir": tmp_path / "out", "projection_dim": 4}  # fmt: skip
    run_script(main, "train_encoder", *(w for k, v in flags.items() for w in (f"--{k}", str(v))))
    measured = json.loads((tmp_path / "out" / "evaluation.jsonl").read_text())
    assert 0 <= measured["trained_class_token_knn"] <= 1
    assert "byol" in (tmp_path / "out" / "README.md").read_text()


# --- the loss


def test_nt_xent_equals_a_float64_loop():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 5, 3, generator=generator)
    z = [row / np.linalg.norm(row) for row in torch.cat([one, two]).double().numpy()]
    total = 0.0
    for i in range(10):
        others = sum(math.exp(z[i] @ z[j] / 0.3) for j in range(10) if j != i)
        total -= math.log(math.exp(z[i] @ z[(i + 5) % 10] / 0.3) / others)
    assert float(nt_xent(one, two, 0.3)) == pytest.approx(total / 10, rel=1e-5)
    assert float(nt_xent(7 * one, two.bfloat16(), 0.3)) == pytest.approx(total / 10, rel=1e-2)


def test_nt_xent_of_equal_views_of_unlike_images_is_near_its_least():
    eye = torch.eye(6)
    assert float(nt_xent(eye, eye, 0.1)) == pytest.approx(math.log(1 + 10 * math.exp(-10)), rel=1e-3)
    ones = torch.ones(6, 4)
    assert float(nt_xent(ones, ones, 0.1)) == pytest.approx(math.log(11), rel=1e-5)


def test_training_pulls_views_together():
    """Both losses fall on a fixed batch, and both reach the encoder."""
    torch.manual_seed(0)
    objective = SimCLRObjective(MODEL, [0.3], [0.4], projection_dim=8)
    images = torch.rand(6, 1, 8, 8) * 2 - 1
    batch = {"views": torch.stack([images, (images + 0.1 * torch.randn(6, 1, 8, 8)).clamp(-1, 1)])}
    optimizer = torch.optim.AdamW(objective.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        out = objective(batch)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append((float(out["class_loss"]), float(out["patch_loss"])))
    assert losses[-1][0] < 0.7 * losses[0][0]
    assert losses[-1][1] < 0.7 * losses[0][1]
    assert all(p.grad is not None for p in objective.parameters())


# --- views


def images_of(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("channels", [1, 3])
def test_without_settings_a_view_is_the_image(channels):
    images = images_of(4, channels, 6, 9)
    state = torch.get_rng_state()
    assert view(images, ViewConfig()) is images
    assert torch.equal(torch.get_rng_state(), state)
    untouched = jitter(images, ViewConfig(jitter_probability=1.0, brightness=0, contrast=0, saturation=0))
    torch.testing.assert_close(untouched, images, atol=1e-6, rtol=0)


def test_a_crop_is_a_box_inside_the_image():
    """Of the image of coordinates a crop shows its own box: inside, of the drawn area and aspect ratio."""
    height, width = 24, 40
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    torch.manual_seed(0)
    crops = random_crop(torch.stack([x, y]).expand(500, 2, -1, -1), 0.3, 1.5)
    assert crops.shape == (500, 2, height, width)
    assert crops.min() >= -1
    assert crops.max() <= 1
    wide = (crops[:, 0, 0, -1] - crops[:, 0, 0, 0]) / 2
    high = (crops[:, 1, -1, 0] - crops[:, 1, 0, 0]) / 2
    assert bool((wide > 0).all())  # nothing is mirrored
    assert bool((high > 0).all())
    area = wide * high
    assert 0.25 < area.min() < 0.4
    assert area.max() > 0.9
    ratio = wide / high
    assert 0.6 < ratio.min() < 0.75
    assert 1.35 < ratio.max() < 1.6
    assert crops[:, 0].mean((1, 2)).std() > 0.1  # boxes lie at different places
    assert abs(float(crops.mean())) < 0.05


def test_a_crop_reads_the_pixels_of_its_box(monkeypatch):
    """Half the width, a quarter from the left, all of the height: bilinear values by hand."""
    images = images_of(1, 1, 4, 8)
    draws = torch.tensor([[0.0], [0.0], [0.5], [0.3]])  # area, aspect ratio, places: the least, the tallest, centred
    monkeypatch.setattr(torch, "rand", lambda *size, device=None: draws)
    got = random_crop(images, 0.5, 2.0)[0, 0]
    for column in range(8):
        place = (column + 0.5) / 8 * 0.5 * 8 + 2 - 0.5
        left = math.floor(place)
        expected = images[0, 0, :, left] * (left + 1 - place) + images[0, 0, :, left + 1] * (place - left)
        torch.testing.assert_close(got[:, column], expected, atol=1e-5, rtol=1e-5)


def test_grey_views_have_equal_channels_and_the_luma():
    images = images_of(3, 3, 4, 5)
    grey = view(images, ViewConfig(grey_probability=1.0))
    torch.testing.assert_close(grey, luma(images).expand_as(grey), atol=1e-6, rtol=0)
    some = view(images.repeat(100, 1, 1, 1), ViewConfig(grey_probability=0.3))
    share = (some.std(1).amax((1, 2)) < 1e-6).float().mean()
    assert 0.2 < float(share) < 0.4


def test_jitter_changes_as_told():
    torch.manual_seed(1)
    images = images_of(200, 3, 6, 4) * 0.2  # values far from the borders, where nothing is cut off
    config = {"jitter_probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    pixels = images / 2 + 0.5
    light = (view(images, ViewConfig(**config | {"brightness": 0.3})) / 2 + 0.5) / pixels
    factors = light.mean((1, 2, 3))
    torch.testing.assert_close(light, factors.view(-1, 1, 1, 1).expand_as(light), atol=1e-4, rtol=0)
    assert 0.7 <= factors.min() < 0.75
    assert 1.25 < factors.max() <= 1.3001
    contrast = view(images, ViewConfig(**config | {"contrast": 0.3}))
    torch.testing.assert_close(luma(contrast).mean((1, 2, 3)), luma(images).mean((1, 2, 3)), atol=1e-4, rtol=0)
    assert 1.2 < float((contrast.std((1, 2, 3)) / images.std((1, 2, 3))).max()) < 1.31
    saturated = view(images, ViewConfig(**config | {"saturation": 0.3}))
    torch.testing.assert_close(luma(saturated), luma(images), atol=1e-4, rtol=0)


def test_view_data_gives_two_views_of_the_same_images():
    config = DataConfig("digits", random_flip=True)
    data = ViewData(load_train_data(config, 1, 8), ViewConfig())
    torch.manual_seed(0)
    batch = data.on_device(data.batch([5, 7, 9, 11]))
    assert batch["views"].shape == (2, 4, 1, 8, 8)
    for place, row in enumerate((5, 7, 9, 11)):
        image = data.data[row]["pixel_values"].float() / 127.5 - 1
        for one in batch["views"][:, place]:
            assert torch.equal(one, image) or torch.equal(one, image.flip(-1))
    assert not torch.equal(batch["views"][0], batch["views"][1])
    assert len(data) == 997
    assert data.fingerprint() == data.data.fingerprint()


def test_accuracy_on_pixels_that_are_the_label():
    labels = torch.arange(40) % 2
    images = (labels * 200).byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8) + torch.randint(0, 9, (40, 1, 8, 8)).byte()
    objective = SimCLRObjective(MODEL, [0.3], [0.4], projection_dim=8)
    accuracy = EncoderAccuracy(objective, (images, labels), (images, labels))(objective.encoder.eval(), 1)
    assert (accuracy["pixels_knn"], accuracy["pixels_linear"]) == (1.0, 1.0)
    assert accuracy["trained_patch_mean_knn"] == accuracy["untrained_patch_mean_knn"]  # nothing was trained
