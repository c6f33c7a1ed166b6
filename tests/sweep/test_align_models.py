"""Several denoisers against several encoders: each score is that of the pair alone."""

import json

import pytest
import torch
from torch import nn

from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics import cknna
from diffusers_repr.sweep import AlignmentComparison, compare_alignments, measure_alignment
from diffusers_repr.sweep.align_curves import comparison_figure
from diffusers_repr.sweep.similarity import CKNNA
from tests.metrics.models import images, rows_denoiser, rows_encoder, unet
from tests.sweep.selection_models import SIDE

LEVELS = [50, 400]


def cells_encoder():
    """Another view of the image: its quarters, as one patch."""
    torch.manual_seed(3)
    return Encoder.from_module(nn.Conv2d(1, 5, SIDE), patch_size=SIDE, channels=1, name="cells")


def two_encoders():
    return [rows_encoder(), cells_encoder()]


@pytest.fixture(scope="module")
def compared():
    models = {"trained": rows_denoiser, "net": unet}  # loaded when it is their turn
    with pytest.warns(UserWarning, match="No cknna of trained with rows for none: "):
        return compare_alignments(models, two_encoders(), images(20), LEVELS, steps=[300, 100], k=4, seed=5)


@pytest.mark.filterwarnings("ignore:No ck")
def test_every_score_is_that_of_the_pair(compared):
    for label, model in (("trained", rows_denoiser), ("net", unet)):
        for encoder in two_encoders():
            alone = measure_alignment(model(), encoder, images(20), LEVELS, k=4, seed=5)
            cells = compared.cells_of(label, encoder.name)
            assert [(c.layer, c.timestep, c.dim) for c in cells] == [(c.layer, c.timestep, c.dim) for c in alone.cells]
            for cell, other in zip(cells, alone.cells, strict=True):
                assert cell.score == (None if other.scores["cknna"] is None else pytest.approx(other.scores["cknna"]))
            best = compared.best_of(label, encoder.name)
            assert (best.layer, best.timestep) == (alone.best.layer, alone.best.timestep)


def test_a_measure_keeps_its_pooling():
    largest = CKNNA("cknna", "max", k=4)
    settings = {"timesteps": [50], "layers": ["conv_in"], "seed": 5}
    (cell,) = compare_alignments({"net": unet}, [rows_encoder()], images(20), metric=largest, **settings).cells
    (alone,) = measure_alignment(unet(), rows_encoder(), images(20), metrics=largest, **settings).cells
    assert cell.score == pytest.approx(alone.scores["cknna"])
    (mean,) = measure_alignment(unet(), rows_encoder(), images(20), k=4, **settings).cells
    assert abs(cell.score - mean.scores["cknna"]) > 1e-3


def test_encoders_beside_each_other_and_what_is_known_of_models(compared):
    rows, cells = (encoder.encode_pixels(2 * images(20) - 1).tokens.mean(1) for encoder in two_encoders())
    between = pytest.approx(cknna(rows, cells, 4), abs=1e-6)
    assert compared.between == {"rows": {"cells": between}, "cells": {"rows": between}}
    assert {label: about["step"] for label, about in compared.models.items()} == {"trained": 300, "net": 100}
    assert compared.models["net"]["parameters"] == sum(p.numel() for p in unet().model.parameters())
    assert list(compared.encoders) == ["rows", "cells"]
    assert [(row["model"], row["encoder"]) for row in compared.best()] == [
        (model, encoder) for encoder in ("rows", "cells") for model in ("trained", "net")
    ]
    with pytest.raises(ValueError, match="No model 'tuned' was compared; there are trained, net"):
        compared.best_of("tuned", "rows")


def test_saved_and_read_back(compared, tmp_path):
    folder = compared.save(tmp_path / "out")
    assert AlignmentComparison.load(folder) == compared
    assert (folder / "alignments.png").read_bytes()[:4] == b"\x89PNG"
    data = json.loads((folder / "alignments.json").read_text())
    data["cells"][3]["model"] = "tuned"
    (folder / "alignments.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"cells\[3\] is of a model or encoder that is not listed"):
        AlignmentComparison.load(folder)


def test_what_the_picture_shows(compared):
    """A row each encoder: curves by depth, a point each model by step, the other encoder dashed."""
    axes = comparison_figure(compared).axes
    assert len(axes) == 4
    for row, (encoder, other) in enumerate((("rows", "cells"), ("cells", "rows"))):
        left, right = axes[2 * row : 2 * row + 2]
        curves = {line.get_label(): line for line in left.lines[:2]}
        best = compared.best_of("net", encoder)
        wanted = [
            c.score for c in compared.cells_of("net", encoder) if c.timestep == best.timestep and c.score is not None
        ]
        assert list(curves["net"].get_ydata()) == wanted
        points = {
            (float(x), float(y))
            for line in right.lines
            for x, y in [line.get_xydata()[0]]
            if len(line.get_xydata()) == 1
        }
        assert points == {(100.0, best.score), (300.0, compared.best_of("trained", encoder).score)}
        for axis in (left, right):
            dashed = [line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "--"]
            assert dashed == [compared.between[encoder][other]]
    assert axes[3].get_xlabel() == "training steps"
    sized = AlignmentComparison(
        **{**vars(compared), "models": {k: {**v, "step": None} for k, v in compared.models.items()}}
    )
    assert comparison_figure(sized).axes[3].get_xlabel() == "parameters, in millions"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "linear"}, "'linear' compares with no encoder"),
        ({"steps": [1]}, "1 steps for 2 models"),
        ({"encoders": [rows_encoder(), rows_encoder()]}, "Encoders of one name: rows, rows"),
        ({"k": 20}, "k must be a whole number from 1 to 19"),
    ],
)
def test_what_is_refused(change, message):
    settings = {"models": {"a": rows_denoiser(), "b": rows_denoiser()}, "encoders": two_encoders(), "data": images(20)}
    with pytest.raises(ValueError, match=message):
        compare_alignments(**{**settings, "timesteps": [50], **change})
    with pytest.raises(TypeError, match="models must be a mapping"):
        compare_alignments(**{**settings, "models": [rows_denoiser()]})
