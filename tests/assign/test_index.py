"""The retrieval index against brute force in float64, in parts and whole, in memory and mapped, exact and by lists."""

import copy
import json
import pickle

import pytest
import torch

from diffusers_repr.assign import RetrievalIndex
from diffusers_repr.assign.inverted_lists import has_faiss
from diffusers_repr.store.vector_store import VectorTable, write_vectors

VECTORS = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 9, 64)[:, None]
QUERIES = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
needs_faiss = pytest.mark.skipif(not has_faiss(), reason="needs the extra faiss")
KINDS = ["exact", pytest.param("ivf", marks=needs_faiss)]


def brute(queries, vectors, k, exclude=None):
    """Rows and cosines by argsort in float64; of equal ones the lower row first."""
    q, v = queries.double(), vectors.double()
    cosines = (q @ v.T / q.norm(dim=1, keepdim=True) / v.norm(dim=1)).float()
    if exclude is not None:
        cosines[torch.arange(len(q)), exclude] = -torch.inf
    order = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
    return order, cosines.gather(1, order)


def check(found, wanted):
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1], atol=1e-6, rtol=0)


def test_exact_equals_argsort():
    index = RetrievalIndex.build(VECTORS)
    assert (len(index), index.dim) == (64, 8)
    assert index.search(QUERIES, 5)[0].dtype == torch.int64
    for k in (1, 5, 64):
        check(index.search(QUERIES, k), brute(QUERIES, VECTORS, k))
    own = torch.arange(64)
    rows, scores = index.search(VECTORS, 63, exclude=own)
    check((rows, scores), brute(VECTORS, VECTORS, 63, own))
    assert not bool((rows == own[:, None]).any())
    assert torch.equal(index.search(VECTORS, 1)[0][:, 0], own)  # without it, each is its own nearest
    torch.testing.assert_close(index.embeddings[rows], VECTORS[rows], rtol=0, atol=0)  # raw, not normalised
    alone = torch.cat([index.search(query[None], 5)[1] for query in QUERIES])
    assert torch.equal(alone, index.search(QUERIES, 5)[1])


def test_equally_near_vectors_come_by_row():
    vectors = torch.cat([VECTORS[:3], VECTORS[:1].repeat(40, 1) * 2, VECTORS[3:]])
    index = RetrievalIndex.build(vectors)
    assert index.search(VECTORS[:1], 12)[0].tolist() == [[0, *range(3, 14)]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_in_parts_equals_whole(kind, dtype, tmp_path):
    lists = {} if kind == "exact" else {"cells": 6, "probes": 2}
    whole = RetrievalIndex.build(VECTORS, kind=kind, dtype=dtype, **lists)
    first = 40  # the cells are learned from the first part, so a whole one of other cells finds others
    grown = RetrievalIndex.build(VECTORS[:first], kind=kind, dtype=dtype, **lists)
    if kind == "ivf":
        cells = grown.parts[0].lists
        whole.parts[0].lists = cells.filled(whole.parts[0].blocks)
    grown.add(VECTORS[first:50]).add(VECTORS[50:])
    wanted = whole.search(QUERIES, 7)
    for index in (grown, grown.save(tmp_path / "index"), RetrievalIndex.open(tmp_path / "index")):
        assert [part.rows for part in index.parts] == [40, 10, 14]
        found = index.search(QUERIES, 7)
        assert torch.equal(found[0], wanted[0])
        assert torch.equal(found[1], wanted[1])
        assert index.fingerprint() == grown.fingerprint()
    on_disk = RetrievalIndex.build(VECTORS[:first], tmp_path / "disk", kind, dtype=dtype, shard_size=16, **lists)
    on_disk.add(VECTORS[first:50], shard_size=4).add(VECTORS[50:])
    assert len(on_disk.embeddings.blocks) == 3 + 3 + 1
    found = RetrievalIndex.open(tmp_path / "disk").search(QUERIES, 7)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


@needs_faiss
def test_lists_find_all_where_all_are_looked_into(tmp_path):
    index = RetrievalIndex.build(VECTORS, tmp_path / "index", "ivf", cells=8, probes=8)
    check(index.search(QUERIES, 5), brute(QUERIES, VECTORS, 5))
    index.probes = 1
    rows, _ = index.search(QUERIES, 40)  # one list has not so many: further ones are looked into
    assert all(len(set(row.tolist())) == 40 for row in rows)
    check(RetrievalIndex.open(tmp_path / "index", "exact").search(QUERIES, 5), brute(QUERIES, VECTORS, 5))


def test_without_faiss(monkeypatch, tmp_path):
    monkeypatch.setattr("diffusers_repr.assign.inverted_lists.has_faiss", lambda: False)
    with pytest.raises(ImportError, match=r"diffusers-repr\[faiss\]"):
        RetrievalIndex.build(VECTORS, tmp_path / "index", "ivf")
    assert not (tmp_path / "index").exists()


def test_frequencies_are_kept(tmp_path):
    index = RetrievalIndex.build(VECTORS, tmp_path / "index")
    assert index.frequencies is None
    rows, _ = index.search(QUERIES, 4)
    index.count_retrieved(rows)
    counts = RetrievalIndex.open(tmp_path / "index").frequencies
    assert counts.tolist() == [int((rows == row).sum()) for row in range(64)]
    assert RetrievalIndex.open(tmp_path / "index").add(VECTORS[:2]).frequencies.tolist() == [*counts.tolist(), 0, 0]
    with pytest.raises(ValueError, match="go from 0 to 64; the index has 64 rows"):
        RetrievalIndex.build(VECTORS).count_retrieved([0, 64])


def test_wrong_use(tmp_path):
    index = RetrievalIndex.build(VECTORS, tmp_path / "index", encoder={"weights": "a", "layer": 3})
    for k, told in (
        (65, "k=65 neighbours of an index of 64 vectors; k runs from 1 to 64"),
        (0, "k=0"),
        (True, "k=Tr"),
    ):
        with pytest.raises(ValueError, match=told):
            index.search(QUERIES, k)
    with pytest.raises(ValueError, match="from 1 to 63 without the excluded one"):
        index.search(QUERIES, 64, exclude=torch.arange(10))
    for queries, told in ((QUERIES[:, :5], r"queries \(B, 8\); got \(10, 5\)"), (QUERIES * torch.nan, "NaN"),
                          (QUERIES * 0, "all zeros")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            index.search(queries, 1)
    with pytest.raises(ValueError, match="3 rows for 10 queries"):
        index.search(QUERIES, 1, exclude=torch.arange(3))
    bad = VECTORS.clone()
    for value, told in ((torch.nan, "Embedding 7 has NaN"), (0.0, "Embedding 7 is all zeros")):
        bad[7] = value
        with pytest.raises(ValueError, match=told):
            RetrievalIndex.build(bad, tmp_path / "bad")
        with pytest.raises(ValueError, match=told):
            copy.copy(index).add(bad)
    assert not (tmp_path / "bad").exists()
    assert RetrievalIndex.open(tmp_path / "index").parts[0].rows == 64
    for vectors, told in ((VECTORS[0], r"\(N, D\)"), (VECTORS.long(), "floats"), (VECTORS[:0], r"got \(0, 8\)")):
        with pytest.raises(ValueError, match=told):
            RetrievalIndex.build(vectors)
    for options, told in (({"kind": "flat"}, "'exact' or 'ivf'"), ({"cells": 3}, "an exact index has none"),
                          ({"kind": "ivf", "cells": 65}, "cells=65 lists of 64"),
                          ({"kind": "ivf", "cells": 4, "probes": 5}, "probes")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            RetrievalIndex.build(VECTORS, **options)
    with pytest.raises(FileExistsError, match="holds an index already"):
        RetrievalIndex.build(VECTORS, tmp_path / "index")
    with pytest.raises(ValueError, match=r'weights: "a" -> "b"'):
        index.check_encoder({"weights": "b", "layer": 3})
    index.check_encoder({"weights": "a", "layer": 3, "name": "elsewhere"})


def test_damaged_files(tmp_path):
    RetrievalIndex.build(VECTORS, tmp_path / "index")
    record = tmp_path / "index/index.json"
    found = json.loads(record.read_text())
    for changes, told in (({"rows": [63]}, r"parts of \[63\] vectors of 8"), ({"dim": 9}, "of 9 values"),
                          ({"kind": "other"}, "index.json.*kind"), ({"format": 2}, "format")):  # fmt: skip
        record.write_text(json.dumps({**found, **changes}))
        with pytest.raises(ValueError, match=told):
            RetrievalIndex.open(tmp_path / "index")
    record.write_text(json.dumps(found))
    (tmp_path / "index/frequencies.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="frequencies.safetensors.*damaged"):
        RetrievalIndex.open(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="no index.json"):
        RetrievalIndex.open(tmp_path)


def test_table_of_vectors(tmp_path):
    RetrievalIndex.build(VECTORS, tmp_path / "index", shard_size=30)
    table = VectorTable.open(tmp_path / "index")
    rows = torch.tensor([[0, 63], [29, 30]])
    assert torch.equal(table[rows], VECTORS[rows])
    assert torch.equal(pickle.loads(pickle.dumps(table))[rows], VECTORS[rows])
    assert torch.equal(pickle.loads(pickle.dumps(VectorTable([VECTORS])))[5], VECTORS[5])
    with pytest.raises(IndexError, match="Rows 64 to 64 of 64"):
        table[64]
    with pytest.raises(ValueError, match="rows 2 to 3 have NaN"):
        write_vectors(tmp_path / "v", 4, 8, lambda a, b: VECTORS[a:b] / torch.tensor([1.0, 1, 0, 1])[a:b, None] * 0,
                      {}, batch_size=2, progress=False)  # fmt: skip
