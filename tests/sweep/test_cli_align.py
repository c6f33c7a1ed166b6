"""`diffusers-repr align` as a user runs it, in one process."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image

import diffusers_repr.cli
from diffusers_repr import FeatureExtractor
from diffusers_repr.cli import main
from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics import cknna
from diffusers_repr.sweep import Alignment, AlignmentComparison
from tests.metrics.models import unet, vit
from tests.sweep.selection_models import striped


@pytest.fixture(autouse=True)
def _command(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(diffusers_repr.cli.COMMANDS, "align", "compare layers with an encoder")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    DDPMPipeline(unet().model, DDPMScheduler()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    features = Features({"image": datasets.Image(), "label": ClassLabel(names=list("abcd"))})
    splits = {}
    for seed, (name, count) in enumerate((("train", 20), ("validation", 12))):
        x, y = striped(count, seed=seed)
        pictures = [Image.fromarray((255 * image[0].numpy()).round().astype(np.uint8)) for image in x]
        splits[name] = Dataset.from_dict({"image": pictures, "label": y.tolist()}, features=features)
    DatasetDict(splits).save_to_disk(folder)
    return str(folder)


def test_from_command_to_files(model, encoder, data, tmp_path, capsys):
    flags = ["--layers", "mid_block", "conv_in", "--timesteps", "50", "400.5", "--k", "4", "--seed", "3", "--quiet"]
    assert main(["align", model, encoder, data, "--out", str(tmp_path / "out"), *flags]) == 0
    found = Alignment.load(tmp_path / "out")
    assert [(c.layer, c.timestep) for c in found.cells] == [
        (layer, t) for t in (50, 400.5) for layer in ("conv_in", "mid_block")
    ]
    assert (tmp_path / "out/alignment.png").read_bytes()[:4] == b"\x89PNG"
    x = [image for image in datasets.load_from_disk(data)["train"]["image"]]
    features = FeatureExtractor(unet(), "mid_block", 50, pooling="mean", seed=3)(x)["mid_block"]
    teacher = Encoder.from_pretrained(encoder)(x)["tokens"].mean(1)
    assert found.score("mid_block", 50) == pytest.approx(cknna(features, teacher, 4), abs=1e-4)
    out = capsys.readouterr().out
    assert "cknna: best layer of each level" in out
    assert f"Saved to {tmp_path / 'out'}" in out


def test_all_metrics_and_a_layer_of_a_denoiser_as_encoder(model, data, tmp_path, capsys):
    flags = ["--layers", "mid_block", "--timesteps", "100", "--metric", "cka", "linear", "knn", "--knn_k", "3"]
    flags += ["--test_split", "validation", "--limit", "16", "--no_plot", "--quiet", "--out", str(tmp_path)]
    assert main(["align", model, f"{model}:mid_block@100", data, *flags, "--json"]) == 0
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    found = Alignment.load(tmp_path)
    assert found.score("mid_block", 100) == pytest.approx(1, abs=1e-5)
    assert found.recipe["data"]["samples"] == 16
    assert found.encoder_scores == {m: found.score("mid_block", 100, m) for m in ("linear", "knn")}
    assert not (tmp_path / "alignment.png").exists()
    assert told["encoder"] == found.encoder_scores
    best = [{"layer": "mid_block", "timestep": 100, "score": found.score("mid_block", 100, "cka")}]
    assert (told["out"], told["best"]["cka"]) == (str(tmp_path), best)


def test_several_models_and_encoders(model, encoder, data, tmp_path, capsys):
    """The same pair twice is known by its folders; scores are those of `align` for one pair."""
    again = shutil.copytree(model, tmp_path / "later")
    flags = [
        "--layers",
        "mid_block",
        "conv_in",
        "--timesteps",
        "50",
        "--k",
        "4",
        "--quiet",
        "--encoder_positions",
        "repa",
    ]
    words = ["align", model, encoder, data, *flags, "--no_plot", "--out", str(tmp_path / "out")]
    layer = f"{model}:conv_in@50"
    assert main([*words, "--models", str(again), "--steps", "100", "300", "--encoders", layer]) == 0
    found = AlignmentComparison.load(tmp_path / "out")
    assert list(found.models) == [Path(model).name, "later"]
    assert [about["step"] for about in found.models.values()] == [100, 300]
    assert list(found.encoders) == [Path(encoder).name, layer]
    assert found.encoders[Path(encoder).name]["positions"] == "repa"
    assert found.best_of("later", layer).layer == "conv_in"
    assert found.best_of("later", layer).score == pytest.approx(1, abs=1e-4)
    out = capsys.readouterr().out
    assert f"cknna with {layer}: best layer and level of each model" in out
    assert f"(the encoder {layer})" in out
    assert out.count("the model's own size") == 2
    assert main(["align", model, encoder, data, *flags, "--out", str(tmp_path / "one"), "--no_plot"]) == 0
    alone = Alignment.load(tmp_path / "one")
    assert main(["align", model, layer, data, *flags, "--out", str(tmp_path / "none"), "--no_plot"]) == 2
    assert "--encoder_positions would not act" in capsys.readouterr().err
    assert found.best_of("later", Path(encoder).name).score == pytest.approx(alone.best.scores["cknna"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "3"], "--steps would not act: one model is measured; --models names further ones"),
        (["--models", "m", "--steps", "3"], "--steps has 1 values for 2 models; give each its own, MODEL first"),
        (["--models", "m", "--labels", "a", "a"], "--labels has 2 values for 2 models; give each its own"),
        (["--encoders", "e", "--metric", "cka", "cknna"], "compared by one --metric"),
        (["--k", "20"], "k must be a whole number from 1 to 19"),
        (["--metric", "cnka"], "Unknown metric 'cnka'"),
        (["--metric", "linear"], "need a --test_split"),
        (["--protocol", "lbfgs"], "--protocol would not act: it is a setting of --metric linear"),
        (["--knn_k", "3"], "--knn_k would not act: it is a setting of --metric knn"),
        (["--metric", "cka"], "--k would not act: it is a setting of --metric cknna"),
        (["--test_split", "validation"], "--test_split would not act: probes are measured on it"),
        (["--layers", "mid_blok"], "mid_block"),
        (["--split", "tran"], "no split 'tran'; it has train, validation"),
        (["--timesteps", "5000"], "5000"),
        (["--image_size", "9"], "multiples of"),
    ],
)
def test_mistakes_take_one_line(flags, message, model, encoder, data, tmp_path, capsys):
    assert main(["align", model, encoder, data, "--out", str(tmp_path / "out"), "--k", "3", "--quiet", *flags]) == 2
    last = capsys.readouterr().err.strip().split("\n")[-1]
    assert last.startswith("diffusers-repr align: ")
    assert message in last
    assert not (tmp_path / "out").exists()


def test_encoders_that_are_none(model, data, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name, message in ((str(tmp_path), "bert"), (f"{model}:nothing@100", "nothing"), ("./missing", "missing")):
        assert main(["align", model, name, data, "--k", "3", "--quiet", "--no_plot"]) == 2
        assert message in capsys.readouterr().err
    assert main(["align", model, model, data, "--k", "3", "--quiet", "--no_plot"]) == 2
    assert "is a pipeline; an encoder is a vision transformer, or a layer of a pipeline" in capsys.readouterr().err
    assert torch.is_grad_enabled()
