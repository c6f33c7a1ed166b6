"""`evaluate` of encoders: the numbers of the one evaluation, saved and loaded; reconstructions by hand."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDPMScheduler

from diffusers_repr import Denoiser
from diffusers_repr.cli import main
from diffusers_repr.data.attributed import load_attributed
from diffusers_repr.data.image_data import load_images
from diffusers_repr.encoders import load_encoder
from diffusers_repr.metrics import ssim
from diffusers_repr.sweep import ProbeSettings, measure_representation
from diffusers_repr.tasks import RepresentationProbe, measure_reconstruction
from diffusers_repr.tasks.evaluation import evaluate_recipe, read_evaluation
from tests.tasks.planted import NAMES, images, pipeline

RECIPE = {
    "task": "representation",
    "base": "model:mid_block@50",
    "fit": {"beside": ["pixels", "random"], "protocol": "ridge"},
    "data": {"path": "data", "train": "train", "measure": ["test"]},
    "measure": {"shots": 2, "draws": 2, "k": 3},
    "seeds": [3],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, labelled images of two splits."""
    folder = tmp_path_factory.mktemp("representation")
    pipeline().save_pretrained(folder / "model")
    for split, rows, seed in (("train", 24, 0), ("test", 12, 1)):
        for at, (picture, label) in enumerate(zip(*images(rows, seed), strict=True)):
            (folder / "data" / split / NAMES[label]).mkdir(parents=True, exist_ok=True)
            picture.save(folder / "data" / split / NAMES[label] / f"{at}.png")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def write(name, recipe):
    Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return f"{name}.yaml"


def test_a_recipe_gives_what_python_gives(capsys):
    assert main(["evaluate", write("layer", RECIPE), "--out", "layer", "--quiet"]) == 0
    assert "| layer | representation | model:mid_block@50 |" in capsys.readouterr().out
    measured = json.loads(Path("layer/metrics.json").read_text())["measured"]["test"]
    encoder = load_encoder("model:mid_block@50")
    settings = ProbeSettings(shots=2, draws=2, k=3, protocol="ridge", seed=3)
    alone = measure_representation(encoder, *(load_images("data", split) for split in ("train", "test")),
                                   settings=settings).flat()  # fmt: skip
    assert {name: measured[name]["mean"] for name in alone} == pytest.approx(alone)
    assert measured["rows"]["mean"] == 12
    assert {"linear: raw pixels", "knn: random network", "few_shot_std"} <= measured.keys()
    for name in ("confusion", "neighbours"):
        assert Path(f"layer/seed-3/pictures/{name}.png").stat().st_size > 500
    told = Path("layer/seed-3/task/representation.json").read_text()
    assert str(Path.cwd()) not in told
    probe = RepresentationProbe.from_pretrained("layer/seed-3/task")
    test = load_images("data", "test")
    right = (probe(test.read(range(12))).argmax(1) == torch.tensor(test.labels())).double().mean()
    assert float(right) == measured["linear"]["mean"] == probe.evaluate(test, record=False)["linear"]
    loaded = {"task": "representation", "load": "layer/seed-3/task", "data": {"path": "data"}}
    again = evaluate_recipe(read_evaluation(write("loaded", loaded)), "loaded")["measured"]["test"]
    assert again["linear"]["mean"] == measured["linear"]["mean"]
    with pytest.raises(ValueError, match="is a layer of a denoiser, which has no pooling"):
        load_encoder("model:mid_block@50", pooling="cls")
    pipeline(seed=1).save_pretrained("other")
    with pytest.raises(ValueError, match="with other weights"):
        RepresentationProbe.from_pretrained("layer/seed-3/task", base="other:mid_block@50")
    with pytest.raises(ValueError, match="what others load the encoder by is a Hub id"):
        probe.push_to_hub("user/head", base="./model")
    with pytest.raises(FileNotFoundError, match="is no representation probe: it has no representation.json"):
        RepresentationProbe.from_pretrained("model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": "./nothing"}, "bad.yaml: base: './nothing' is not here. Give an encoder's folder"),
        ({"base": "./nothing:mid_block@3"}, "bad.yaml: base: './nothing' is not here. Give a pipeline's folder"),
        ({"base": "model"}, "is a pipeline; an encoder is"),
        ({"base": "model:mid_blok@50"}, "mid_blok"),
        ({"source": {"name": "plain"}}, "bad.yaml: source: the task representation reads its base"),
        ({"fit": {"beside": ["pixel"]}}, "pixel"),
        ({"measure": {"shot": 5}}, "Unknown key 'shot' in bad.yaml: measure. Closest allowed: ['shots'"),
        ({"data": {"path": "data", "attributes": ["slant"]}}, "attributes: data has no column 'slant'"),
        ({"measure": {"reconstruction_steps": 5}}, "is no folder of a diffusion autoencoder"),
    ],
)
def test_what_is_refused(changes, message, tmp_path, capsys):
    recipe = {**RECIPE, "fit": {"beside": [], "protocol": "ridge"}, **changes}
    assert main(["evaluate", write("bad", recipe), "--out", str(tmp_path / "bad"), "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_attributes_are_columns_and_are_measured():
    import datasets

    generator = torch.Generator().manual_seed(0)
    for split, rows in (("train", 60), ("test", 40)):
        pictures, labels = images(rows, seed=rows)
        light = [float(torch.rand(1, generator=generator)) for _ in range(rows)]
        columns = {"image": pictures, "label": labels, "light": light, "side": [label % 2 for label in labels]}
        features = datasets.Features({
            "image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES),
            "light": datasets.Value("float32"), "side": datasets.Value("int64"),
        })  # fmt: skip
        Path("columns").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(f"columns/{split}-00000-of-00001.parquet")
    found = load_attributed("columns", "test", attributes=["light", "side"])
    assert found.attributes["light"].dtype == torch.float32
    assert found.select([3, 1]).attributes["side"].tolist() == [found.attributes["side"][at] for at in (3, 1)]
    recipe = {**RECIPE, "data": {"path": "columns", "train": "train", "measure": ["test"], "train_limit": 40,
                                 "attributes": ["light", "side"]}}  # fmt: skip
    told = evaluate_recipe(read_evaluation(write("columns", recipe)), "with-columns")["measured"]["test"]
    assert {"disentanglement", "tad", "completeness: raw pixels"} <= told.keys()
    with pytest.raises(ValueError, match="attributes are class ids or numbers"):
        load_attributed("columns", "test", attributes=["image"])


class Codec:
    """A pipeline whose code is the mean of an image, and whose noise is the rest of it."""

    def encode(self, images, steps):
        code = images.mean((1, 2, 3))[:, None]
        return type("Code", (), {"code": code, "x_T": images - code[:, :, None, None]})

    def decode(self, code, x_T=None, num_inference_steps=0, generator=None, output_type="pt"):  # noqa: N803
        assert output_type == "pt"
        if x_T is None:
            assert len(generator) == len(code)
            x_T = torch.stack([0.1 * torch.randn(1, 16, 16, generator=one) for one in generator])  # noqa: N806
        return type("Output", (), {"images": (code[:, :, None, None] + x_T).clamp(0, 1)})

    def reconstruct(self):
        """There is one."""


def test_reconstructions_from_inferred_and_drawn_noise_apart():
    pictures = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = measure_reconstruction(Codec(), pictures, steps=3, seed=7, batch_size=2)
    assert found["mse_inferred"] == pytest.approx(0, abs=1e-12)
    assert found["ssim_inferred"] == pytest.approx(1)
    wanted = []
    for row in range(5):
        drawn = 0.1 * torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(7 + row))
        wanted.append(float((((pictures[row].mean() + drawn).clamp(0, 1) - pictures[row]) ** 2).mean()))
    assert found["mse_random"] == pytest.approx(sum(wanted) / 5, rel=1e-5)
    with pytest.raises(TypeError, match="reconstructs nothing"):
        measure_reconstruction(object(), pictures)
    with pytest.raises(ValueError, match="tensor"):
        measure_reconstruction(Codec(), pictures[0])


def test_a_plain_model_is_inverted_as_by_the_formula():
    """DDIM both ways, step by step in float64, beside the folder's own numbers."""
    pictures = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    found = measure_reconstruction("model", pictures, steps=4)
    unet = Denoiser.from_pretrained("model").model
    bars = DDPMScheduler().alphas_cumprod.double()
    times = [0, 250, 500, 750]
    x = 2 * pictures - 1

    def step(x, told, here, there):
        with torch.no_grad():
            eps = unet(x.float(), told).sample.double()
        clean = (x.double() - (1 - here) ** 0.5 * eps) / here**0.5
        return there**0.5 * clean + (1 - there) ** 0.5 * eps

    one = torch.tensor(1.0).double()
    way = [(-1, one), *((t, bars[t]) for t in times)]
    for (told, here), (_, there) in zip(way[:-1], way[1:], strict=True):
        x = step(x, told, here, there)
    for (told, here), (_, there) in zip(way[:0:-1], way[-2::-1], strict=True):
        x = step(x, told, here, there)
    back = (x / 2 + 0.5).clamp(0, 1)
    assert found["mse_inferred"] == pytest.approx(float(((back - pictures) ** 2).mean()), rel=1e-3)
    assert found["ssim_inferred"] == pytest.approx(float(ssim(back, pictures.double()).mean()), abs=1e-4)
    assert "mse_random" not in found
