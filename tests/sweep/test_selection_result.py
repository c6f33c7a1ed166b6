"""What a selection leaves behind: files, an extractor, a picture; over every family, and by command."""

import builtins
import dataclasses
import io
import json
import math
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_repr import Denoiser, FeatureExtractor, list_layers
from diffusers_repr.cli import main
from diffusers_repr.sweep import Selection, picture, select_features
from tests.sweep.selection_models import Rows, planted, striped
from tests.sweep.test_selection_data import rows
from tests.testers.cases import some
from tests.testers.models import CONDITIONS, PIPELINES, SIZES, build, saved

BASE = {"progress": False, "seeds": (0, 1), "max_layers": 2, "max_levels": 2, "finalists": 2}


@pytest.fixture(scope="module")
def model():
    return planted(noise=Rows((4, 5)), bit0=Rows((0,)), bit1=Rows((2,)))


@pytest.fixture(scope="module")
def selection(model):
    return select_features(
        model, striped(48, 0), striped(32, 1), [20, 5, 300], noise=("per_image", "clean"), image_size=8, **BASE
    )


def test_saved_and_loaded_is_the_same(selection, tmp_path):
    folder = selection.save(tmp_path / "new" / "folder")
    assert sorted(p.name for p in folder.iterdir()) == ["heatmap.png", "selection.json", "selection.parquet"]
    assert Selection.load(folder) == selection


def test_the_size_and_the_repr(selection, model):
    """A selection knows the size of its images: None, as older ones have it, is theirs."""
    assert selection.recipe["image_size"] == [8, 8]
    assert selection.extractor(model).image_size == (8, 8)
    older = dataclasses.replace(selection, recipe={**selection.recipe, "image_size": None})
    assert older.extractor(model).image_size == "keep"
    best = selection.best
    assert repr(selection) == (
        f"Selection(best {best.layer!r} at timestep {best.timestep:g}, noise={best.noise!r}: "
        f"{selection.metric} {best.score:.4g},\n"
        f"    18 cells, {len(selection.finalists)} finalists, sets of layers, levels, model=None)"
    )


def test_files_read_without_this_library(selection, tmp_path):
    selection.save(tmp_path)
    data = json.loads((tmp_path / "selection.json").read_text())
    assert data["best"]["layer"] == selection.best.layer
    assert data["sets"]["layers"]["layers"] == ["bit0", "bit1"]
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "selection.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(table) == len(selection.cells) == 2 * 3 * 3
    for row, cell in zip(table, selection.cells, strict=True):
        assert (row["layer"], row["timestep"], row["noise"]) == (cell.layer, cell.timestep, cell.noise)
        assert row["score"] == cell.score


def test_the_picture_is_a_png_of_every_cell(selection):
    image = Image.open(io.BytesIO(selection.heatmap()))
    assert image.format == "PNG"
    assert image.width > image.height > 300


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_losses_are_shown_positive_and_accuracies_in_percent(selection, monkeypatch):
    monkeypatch.setattr(picture, "png_of", lambda figure: figure)
    cells = sorted((c for c in selection.cells if c.noise == "clean"), key=lambda c: (c.order, c.nsr))
    figure = selection.heatmap()
    assert texts(figure.axes[1]) == [f"{100 * cell.score:.1f}" for cell in cells]
    assert figure.axes[-1].get_ylabel() == "validation accuracy (%)"
    assert "image without noise" in figure.axes[1].get_xlabel()
    losses = tuple(replace(cell, score=cell.score - 1) for cell in selection.cells)
    best = replace(selection.best, score=selection.best.score - 1, mean=-0.0625, std=0.003)
    figure = replace(selection, cells=losses, best=best, metric="neg_brier").heatmap()
    assert texts(figure.axes[1]) == [f"{1 - cell.score:.2f}" for cell in cells]
    assert figure.axes[-1].get_ylabel() == "Brier score on validation (lower is better)"
    assert figure.get_suptitle().endswith("Brier score on validation 0.062 ± 0.003 over 2 noise seeds")
    colours = figure.axes[1].get_images()[0]
    low, high = colours.to_rgba(colours.norm.vmin)[:2], colours.to_rgba(colours.norm.vmax)[:2]
    assert low[0] > 0.9 > 0.3 > high[0]  # the lowest loss is bright


def test_a_cell_is_shown_in_four_digits(selection):
    cell = replace(selection.best, score=1 / 3, mean=None, seed_scores=(2 / 3, 0.5))
    assert "score=0.3333, " in repr(cell)
    assert repr(cell).endswith("mean=None, std=" + f"{cell.std:.4g}, seed_scores=(0.6667, 0.5))")
    assert eval(repr(cell), {"SelectionCell": type(cell)}).layer == cell.layer  # noqa: S307


def test_colours_leave_out_the_worst_layer():
    grid = [[0.9, 0.8], [0.7, math.nan], [0.1, 0.2]]
    assert picture._colour_range([grid], False) == (0.7, 0.9, "min")
    assert picture._colour_range([grid], True) == (0.1, 0.7, "max")
    assert picture._colour_range([grid, [[0.5, 0.5], [0.9, 0.9], [0.3, 0.4]]], False) == (0.5, 0.9, "min")
    assert picture._colour_range([grid[:2]], False) == (0.7, 0.9, "neither")
    assert picture._colour_range([[[math.nan]]], False) == (0.0, 1.0, "neither")


def test_without_matplotlib_the_rest_is_saved(selection, tmp_path, monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'pip install "diffusers-repr\[plot\]"'):
        selection.save(tmp_path)
    assert Selection.load(tmp_path) == selection
    selection.save(tmp_path, heatmap=False)


def test_load_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no selection\.json"):
        Selection.load(tmp_path)
    (tmp_path / "selection.json").write_text("{}")
    with pytest.raises(ValueError, match="no selection of format"):
        Selection.load(tmp_path)


def test_extractor_reads_what_was_selected(selection, model):
    read = selection.extractor(model)
    assert read.layers == [selection.best.layer]
    assert read(striped(4)[0]).features[selection.best.layer].shape == (4, 8)
    levels = selection.extractor(model, "levels", batch_size=2)
    assert levels.layers == list(selection.sets["levels"].layers)
    assert levels.batch_size == 2
    with pytest.raises(ValueError, match="best, layers, levels"):
        selection.extractor(model, "all")


@pytest.mark.parametrize("name", some(PIPELINES, "ddpm", "sd", "dit", "flux"))
def test_every_family(name):
    denoiser = Denoiser.from_pipe(build(name))
    height, width = SIZES[name]
    size = (height, height) if denoiser.family.square() else (height, width)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(12, denoiser.image_channels, *size, generator=generator)
    images[::2] *= 0.5
    labels = torch.arange(12) % 2
    layers = [layer.path for layer in list_layers(denoiser, size)][2:6:2]
    train, held, condition = (images[:8], labels[:8]), (images[8:], labels[8:]), CONDITIONS[name]
    settings = {"batch_size": 3, "image_size": "keep"}
    found = select_features(denoiser, train, held, [300, 100], layers, "neg_mse", **settings, **condition, **BASE)
    read = FeatureExtractor(denoiser, layers, 300, pooling="mean", **settings)
    out = read(images, **condition)
    for layer in layers:
        z, y = out[layer].double().numpy(), labels.double().numpy()
        cell = next(c for c in found.cells if (c.layer, c.timestep) == (layer, 300))
        assert cell.dim == z.shape[1]
        z = (z - z[:8].mean(0)) / z[:8].std(0)
        gram = z[:8].T @ z[:8] / 8 + cell.penalty * np.eye(z.shape[1])
        weight = np.linalg.solve(gram, z[:8].T @ (y[:8] - y[:8].mean()) / 8)
        slow = -((z[8:] @ weight + y[:8].mean() - y[8:]) ** 2).mean()
        assert cell.score == pytest.approx(slow, rel=1e-3)


@pytest.fixture
def folder(tmp_path):
    """Parquet files of two splits, 16 by 16 pixels."""

    def write(**splits):
        (tmp_path / "data").mkdir()
        for name, data in splits.items():
            data.to_parquet(tmp_path / "data" / f"{name}.parquet")
        return str(tmp_path / "data")

    return write


def command(data, out, *more):
    short = ["--timesteps", "10", "100.5", "--layers", "conv_in", "mid_block", "--image_size", "16"]
    few = ["--max_layers", "1", "--max_levels", "1", "--seeds", "0", "--quiet"]
    return main(["select", str(saved("ddpm")), data, *short, *few, "--out", str(out), *more])


def test_command(folder, tmp_path, capsys):
    data = folder(train=rows(40), validation=rows(24, 1), test=rows(24, 2))
    assert command(data, tmp_path / "out") == 0
    assert "conv_in" in capsys.readouterr().out
    found = Selection.load(tmp_path / "out")
    assert found.recipe["validation"]["rows"] == 24
    assert {c.timestep for c in found.cells} == {10, 100.5}
    assert (tmp_path / "out" / "heatmap.png").is_file()


def test_a_loss_is_printed_positive(folder, tmp_path, capsys):
    data = folder(train=rows(40), validation=rows(24, 1))
    assert command(data, tmp_path / "out", "--metric", "neg_brier", "--no_heatmap") == 0
    table = capsys.readouterr().out.splitlines()
    best = Selection.load(tmp_path / "out").best
    assert best.mean < 0
    head = next(line for line in table if line.startswith("layer"))
    assert "Brier score on validation (lower is better; mean ± std of noise seeds)" in head
    assert f"{-best.mean:.4f} ± " in table[table.index(head) + 1]
    assert not any("-0." in line for line in table)
    found = repr(Selection.load(tmp_path / "out"))
    assert f"Brier score on validation {-best.score:.4g}" in found


def test_command_holds_out_where_there_is_no_validation_split(folder, tmp_path, capsys):
    data = folder(train=rows(40), test=rows(24, 2))
    assert command(data, tmp_path / "out", "--validation_fraction", "0.3", "--no_heatmap") == 0
    assert "held out 12 of 40" in capsys.readouterr().out
    found = Selection.load(tmp_path / "out")
    assert (found.recipe["train"]["rows"], found.recipe["validation"]["rows"]) == (28, 12)
    assert not (tmp_path / "out" / "heatmap.png").exists()


def test_command_on_one_file(folder, tmp_path, capsys):
    data = folder(train=rows(40)) + "/train.parquet"
    assert command(data, tmp_path / "out", "--no_heatmap") == 0
    told = capsys.readouterr().out
    assert "held out 8 of 40 images for the probe to be measured on (--test_fraction 0.2)" in told
    assert "held out 6 of 32 images to score on (--validation_fraction 0.2)" in told
    recipe = Selection.load(tmp_path / "out").recipe
    assert (recipe["train"]["rows"], recipe["validation"]["rows"]) == (26, 6)
    assert command(data, tmp_path / "whole", "--no_heatmap", "--test_fraction", "0") == 0
    assert "held out 8 of 40 images to score on" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--validation_split", "test"], "test data"),
        (["--train_split", "test"], "test data"),
        (["--validation_split", "dev"], "has no split 'dev'"),
        (["--layers", "mid_blok"], "Closest"),
        (["--image_size", "1", "2", "3"], "--image_size"),
        (["--label_column", "digit"], "no column 'digit'"),
    ],
)
def test_command_tells_what_is_wrong(folder, tmp_path, capsys, more, message):
    data = folder(train=rows(24), test=rows(24, 2))
    assert command(data, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
