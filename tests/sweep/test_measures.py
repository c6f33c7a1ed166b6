"""Measures of one's own, dense ones too; results of the format before they had one base; several processes."""

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from diffusers_repr import FeatureExtractor
from diffusers_repr.sweep import (
    CKA,
    Alignment,
    CellScore,
    Measure,
    Selection,
    Tally,
    measure_alignment,
    register_measure,
    select_features,
)
from diffusers_repr.sweep.measure import MEASURES
from tests.metrics.models import rows_encoder
from tests.sweep.selection_models import Rows, planted, striped

OLD = Path(__file__).parents[1] / "data" / "old"
BASE = {"progress": False, "seeds": (0,), "max_layers": 1, "max_levels": 1, "noise": "clean"}


@dataclasses.dataclass(frozen=True)
class BrightestColumn(Measure):
    """Dense: the share of held images whose brightest column of the map is the one that is asked for."""

    pooling: str | None = dataclasses.field(default=None, init=False)
    roles: ClassVar[tuple[str, ...]] = ("held",)

    def bytes_of(self, layer, bench):
        return 8

    def tally(self, grid, bench):
        return _Hits(self, bench)


class _Hits(Tally):
    def __init__(self, measure, bench):
        self.measure, self.bench, self.hits = measure, bench, {}

    def add(self, role, piece):
        for path, maps in piece.features[None].items():
            hits = maps.mean((1, 2)).argmax(1) == self.bench.splits[role].targets[piece.at]
            at = (piece.level, path)
            self.hits[at] = self.hits.get(at, 0) + int(hits.sum())

    def scores(self):
        count = len(self.bench.splits["held"])
        return {at: {self.measure.name: CellScore(hits / count)} for at, hits in self.hits.items()}


@pytest.fixture
def registered():
    register_measure("brightest")(BrightestColumn)
    yield
    del MEASURES["brightest"]


def bright(count, seed):
    """`(images, column)`: noise, and one column of row 2 that is brighter."""
    generator = torch.Generator().manual_seed(seed)
    x, column = 0.3 * torch.rand(count, 1, 8, 8, generator=generator), torch.arange(count) % 8
    x[torch.arange(count), 0, 2, column] = 1.0
    return x, column


def test_a_dense_measure_of_ones_own_selects_the_layer_that_shows_what_it_needs(registered):
    model = planted(noise=Rows((4, 5)), signal=Rows((2,), (3,), 5))
    found = select_features(model, bright(24, 0), bright(40, 1), [5, 10], metric="brightest", batch_size=7, **BASE)
    assert (found.best.layer, found.best.score, found.metric) == ("signal", 1.0, "brightest")
    expected = {}
    for cell in found.cells:
        maps = FeatureExtractor(model, cell.layer, cell.timestep, noise="clean")(bright(40, 1)[0])[cell.layer]
        hits = sum(
            int(one.mean((0, 1)).argmax()) == column for one, column in zip(maps, bright(40, 1)[1], strict=True)
        )
        expected[cell.layer, cell.timestep] = hits / 40
    assert {(c.layer, c.timestep): c.score for c in found.cells} == expected
    assert model.model.forwards == 2 * 6 + 4  # only the held images, all layers at once; four single extractions
    assert found.recipe["pooling"] is None
    with pytest.raises(ValueError, match="pass max_layers=1"):
        select_features(model, bright(24, 0), bright(40, 1), [5], metric="brightest", max_layers=3, progress=False)
    with pytest.raises(ValueError, match="'brightest' is the metric .*BrightestColumn already"):
        register_measure("brightest")(BrightestColumn)


def test_measures_of_both_kinds_share_one_forward():
    model, encoder = planted(noise=Rows((4, 5)), signal=Rows((0, 2))), rows_encoder()
    names = ("accuracy", "knn", CKA("cka", clamp_quantile=0.9), "balanced_accuracy")
    train, test = striped(24, 0), striped(20, 1)
    found = measure_alignment(
        model, encoder, train, [10], metrics=names, test=test, knn_k=3, batch_size=64, noise="clean"
    )
    assert model.model.forwards == 2
    assert found.metrics == ("accuracy", "knn", "cka", "balanced_accuracy")
    chosen = select_features(model, train, test, [10], **BASE)
    assert [c.scores["accuracy"] for c in found.cells] == [c.score for c in chosen.cells]
    voted = select_features(model, train, test, [10], metric="knn", **BASE)
    assert voted.best.layer == "signal"
    assert found.record("accuracy").counts == {"samples": 24, "test": 20}
    assert found.record("cka").settings["clamp_quantile"] == 0.9
    with pytest.raises(ValueError, match="'cka' compares with an encoder"):
        select_features(model, train, test, [10], metric="cka", **BASE)


def test_results_of_the_format_before_still_open(tmp_path):
    selection, alignment = Selection.load(OLD / "selection"), Alignment.load(OLD / "alignment")
    for found, name in ((selection, "selection"), (alignment, "alignment")):
        found.save(tmp_path, False)
        written, old = ((folder / f"{name}.json").read_text() for folder in (tmp_path, OLD / name))
        assert json.loads(written) == json.loads(old)
    assert (selection.best.layer, selection.best.mean) == ("bit0", selection.finalists[0].mean)
    assert alignment.best.layer == "all"
    assert alignment.record().settings["noise"] == "per_image"
