"""Stores of assignments: class ids and neighbours of every row, gone on with, and checked."""

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.store import AssignmentStore, write_assignments

ROWS, K = 7, 3
RECORD = {"assigner": {"kind": "kmeans", "seed": 0}, "data": {"name": "pets"}}
CLASSES = np.array([0, 2, -1, 1, 0, 2, 2])
NEIGHBOURS = (np.arange(ROWS)[:, None] * 5 + np.arange(K)) % 11
DISTANCES = np.linspace(0, 1, ROWS * K, dtype=np.float32).reshape(ROWS, K)
ALL = {"class_id": CLASSES, "neighbours": NEIGHBOURS, "distances": DISTANCES}


def assign(columns=ALL):
    return lambda start, stop: {name: values[start:stop] for name, values in columns.items()}


def write(out, assign=assign(ALL), **settings):  # noqa: B008
    settings = {**RECORD, "num_classes": 3, "index_rows": 11, "batch_size": 2, "shard_size": 4, **settings}
    return write_assignments(out, ROWS, assign, progress=False, **settings)


def test_holds_what_the_assigner_gave(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    store = write(tmp_path / "out")
    store.verify()
    for name, values in ALL.items():
        np.testing.assert_array_equal(store.array(name), values)
        assert store.array(name).dtype == values.dtype
    assert store.assigner == RECORD["assigner"]
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train")
    assert (rows["class_id"][:], rows["neighbours"][6]) == (CLASSES.tolist(), NEIGHBOURS[6].tolist())
    assert plan_upload(tmp_path / "out").kind == AssignmentStore.noun
    alone = write(tmp_path / "alone", assign({"class_id": CLASSES}), split="test", shard_size=None)
    assert [file.name for file in (alone.folder / "data").iterdir()] == ["test-00000-of-00001.parquet"]
    with pytest.raises(KeyError, match="No column 'neighbours'.*class_id"):
        alone.array("neighbours")


def test_is_gone_on_with_and_refuses_another_record(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out/data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match="not finished: 4 of 7 rows .1 of 2 shards.*train-00001-of-00002.parquet is"):
        AssignmentStore.open(tmp_path / "out")
    asked = []
    write(tmp_path / "out", lambda start, stop: asked.append((start, stop)) or assign()(start, stop)).verify()
    assert asked == [(0, 1), (4, 6), (6, 7)]  # the first for the shapes
    with pytest.raises(FileExistsError, match="another recipe.*assigner.seed: 0 -> 1"):
        write(tmp_path / "out", assigner={"kind": "kmeans", "seed": 1})
    before = {file: file.read_bytes() for file in (tmp_path / "out").glob("data/*")}
    for changes, message in (
        ({"assign": assign({"class_id": CLASSES})}, r"layout.columns.neighbours: \[3\] -> null"),
        ({"num_classes": 9}, "layout.num_classes: 3 -> 9"),
        ({"split": "test"}, 'layout.split: "train" -> "test"'),
    ):  # the record is the same
        with pytest.raises(FileExistsError, match=message):
            write(tmp_path / "out", **changes)
    assert {file: file.read_bytes() for file in (tmp_path / "out").glob("data/*")} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_id": CLASSES + 1}, "rows 0 to 1 holds 'class_id' outside -1 to 2"),
        ({"neighbours": NEIGHBOURS + 1}, "holds 'neighbours' outside 0 to 10"),
        ({"neighbours": -NEIGHBOURS}, "holds 'neighbours' outside 0 to 10"),
        ({"distances": DISTANCES + np.inf}, "NaN or infinity in 'distances'"),
        ({"cluster": CLASSES}, "gives .*cluster; allowed are class_id"),
        ({"class_id": NEIGHBOURS}, "layout.columns.class_id is .3."),
        ({"class_id": CLASSES / 2}, "gave 'class_id' as float64; give whole numbers"),
    ],
)
def test_what_cannot_be(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", assign({**ALL, **changes}))
    assert not list((tmp_path / "out").glob("data/*.parquet"))


def test_a_shard_of_others(tmp_path):
    path = write(tmp_path / "out").folder / "data/train-00001-of-00002.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("class_id")
    pq.write_table(table.set_column(at, table.schema.field(at), [[0, 3, 1]]), path)
    store = AssignmentStore.open(tmp_path / "out")
    for read in (store.verify, lambda: store.array("class_id")):
        with pytest.raises(ValueError, match="00001-of-00002.parquet' holds 'class_id' outside -1 to 2"):
            read()
