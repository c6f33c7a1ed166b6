import dataclasses
import json

import pytest

from diffusers_repr.metrics import MetricRecord, UnlikeRecordsError, compare
from diffusers_repr.metrics.record import COMPARED


def record(**changes):
    settings = {
        "metric": "frechet_distance",
        "value": 12.5,
        "encoder": {"name": "vit", "layers": [1, 2]},
        "features": "global",
        "counts": {"real": 100, "generated": 50},
        "reference": "abc",
        "resize": "32x32 to 224x224",
        "weights": "def",
        "backend": {"name": "torchmetrics", "version": "1.9"},
        "k": 3,
        "seed": 0,
        "settings": {"sides": (1, 2)},
    }
    return MetricRecord(**{**settings, **changes})


OTHER = {
    "metric": "precision",
    "encoder": {"name": "vit", "layers": [1, 3]},
    "features": "tokens",
    "counts": {"real": 100, "generated": 51},
    "reference": "xyz",
    "resize": None,
    "weights": "fed",
    "backend": {"name": "torchmetrics", "version": "2.0"},
    "k": 5,
    "seed": 1,
    "settings": {"sides": (1, 3)},
}


def test_like_records_compare(tmp_path):
    a, b = record(subject="with REPA"), record(value=10, subject="without", note="second run")
    assert a - b == compare(a, b) == 2.5
    assert b - a == -2.5
    assert float(a) == 12.5
    path = a.save(tmp_path / "runs/a.json")
    again = MetricRecord.load(path)
    assert again - b == 2.5  # lists for tuples do not matter
    assert json.loads(path.read_text())["backend"] == {"name": "torchmetrics", "version": "1.9"}


@pytest.mark.parametrize("name", COMPARED)
def test_every_field_that_differs_is_named(name, tmp_path):
    a, b = record(), record(**{name: OTHER[name]})
    for left, right in ((a, b), (b, a), (MetricRecord.load(a.save(tmp_path / "a.json")), b)):
        with pytest.raises(UnlikeRecordsError, match=f"differ in {name}: {name}") as caught:
            left - right
        assert caught.value.fields == (name,)
    assert compare(a, b, ignore=[name]) == 0


def test_all_differences_are_named_at_once():
    with pytest.raises(UnlikeRecordsError) as caught:
        record() - record(**OTHER)
    assert caught.value.fields == COMPARED
    assert "counts.generated: 50 -> 51" in str(caught.value)
    assert compare(record(), record(**OTHER, value=2), ignore=COMPARED) == 10.5


def test_every_field_is_compared_or_free_to_differ():
    names = {field.name for field in dataclasses.fields(MetricRecord)}
    assert names - set(COMPARED) == {"value", "subject", "note"}
    assert set(OTHER) == set(COMPARED)


def test_bad_records(tmp_path):
    for value in (float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="finite number"):
            record(value=value)
    with pytest.raises(ValueError, match="metric must be a name"):
        record(metric="")
    with pytest.raises(ValueError, match="no field that is compared"):
        compare(record(), record(), ignore="values")
    with pytest.raises(TypeError):
        record() - 3
    with pytest.raises(FileNotFoundError):
        MetricRecord.load(tmp_path / "none.json")
    for text, message in (("{}", "no metric record"), ("[1]", "no metric record"), ("{", "not valid JSON")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            MetricRecord.load(tmp_path / "bad.json")
    for broken in ({"metric": "x"}, {"metric": "x", "value": 1.0, "colour": 2}):
        with pytest.raises(ValueError, match="no 'value'|colour, which this version|'colour'"):
            MetricRecord.from_dict({"format": "diffusers_repr.metric/1", **broken})
