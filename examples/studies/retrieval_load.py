"""The retrieval index under load: a million random vectors built, memory-mapped and searched, exactly and by lists.

    python examples/studies/retrieval_load.py --work outputs/retrieval --results docs/results/retrieval

Times are CPU seconds, so that other work on the machine does not count. Vectors of a normal distribution have no
clusters and are the worst case of inverted lists; vectors around centres are more like those of an encoder. Writes
load.json and README.md with a plan for a thousand million.
"""

import argparse
import json
import resource
import shutil
import time
from functools import partial
from pathlib import Path

import torch

from diffusers_repr.assign import RetrievalIndex
from diffusers_repr.cli.guard import run_script

K, QUERIES = 10, 128
CENTRES, SPREAD = 10_000, 1.0  # of vectors around centres: as far from their centre as that is from 0
PAGE = """# The retrieval index under load

{rows:,} random vectors of {dim} values, stored in half precision, built by `RetrievalIndex.build`, memory-mapped by
`RetrievalIndex.open` and searched for the {k} nearest of {queries} queries, in one batch, that are none of them. Times
are CPU seconds on {threads} thread{s}; recall is against the exact search. Made by `python
examples/studies/retrieval_load.py` ([numbers](load.json)).

| vectors | kind | lists looked into | recall of {k} | queries a CPU second |
|---|---|---|---|---|
{table}

| vectors | kind | build, CPU seconds | on disk, GB | to open, CPU seconds | memory to build, GB |
|---|---|---|---|---|---|
{built}

Random vectors without clusters are the worst case: the nearest of a million in {dim} dimensions are hardly nearer than
the rest, and lie in any list. What an encoder gives has clusters, as vectors around {centres:,} centres have.

## A plan for a thousand million

By the numbers above, at {dim} values and `dtype="float16"`:

| | 1e6 | 2e7 (RDM's OpenImages) | 1e9 |
|---|---|---|---|
{plan}

- **Parts.** `index.add` a million at a time: each part is a folder of vectors and lists of its own, with the cells of
  the first, and all are searched as one index, bit for bit what one part gives
  ([tests](../../../tests/assign/test_index.py)). Row numbers are 64 bits.
- **Cells** are as many as the root of the number of vectors, learned from 64 vectors a cell: for 1e9 from two million.
  The first part must hold these, and `cells=` says how many, for the default is the root of the first part alone.
- **A query** looks into `probes` of the cells and reads so many vectors' lists. Lists lie on disk and are mapped, so a
  machine needs memory for the cells and for what is read often.
- **Exact** search of 1e9 reads all of it once for a batch of queries: for a check of the recall, not for work.
- **What would have to be built first.** Lists hold whole vectors in half precision. At 1e9 they should hold product
  codes of 64 bytes (64 GB in place of 1,024), ranked again by the stored vectors as candidates are now. This is not in
  the package. For training nothing is searched: neighbours are computed once, 20 row numbers an image
  (`diffusers-repr assign`).
"""


def make(rows: int, dim: int, kind: str, seed: int) -> torch.Tensor:
    """Vectors `(rows, dim)` in half precision; those of one kind lie around the same centres whatever the seed."""
    centres = torch.randn(CENTRES, dim, generator=torch.Generator().manual_seed(1234))
    generator, made = torch.Generator().manual_seed(seed), torch.empty(rows, dim, dtype=torch.float16)
    for start in range(0, rows, 1 << 15):
        part = torch.randn(min(1 << 15, rows - start), dim, generator=generator)
        if kind == "centres":
            part = SPREAD * part + centres[torch.randint(CENTRES, (len(part),), generator=generator)]
        made[start : start + len(part)] = part
    return made


def timed(run):
    start = time.process_time()
    result = run()
    return result, time.process_time() - start


def on_disk(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9


def measure(work: Path, rows: int, dim: int, kind: str, probes: list[int]) -> dict:
    """Build, open and search one set of vectors."""
    folder = work / kind
    shutil.rmtree(folder, ignore_errors=True)
    queries = make(QUERIES, dim, kind, 1).float()
    found: dict = {"vectors": kind, "rows": rows, "dim": dim, "built": [], "searched": []}
    vectors = make(rows, dim, kind, 0)
    _, seconds = timed(partial(RetrievalIndex.build, vectors, folder, "ivf", dtype="float16"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    index, opened = timed(lambda: RetrievalIndex.open(folder))
    found["built"].append({
        "kind": "ivf", "cells": index.cells, "seconds": seconds, "gigabytes": on_disk(folder), "open_seconds": opened,
        "peak_gigabytes": peak,
    })  # fmt: skip
    del vectors
    exact = RetrievalIndex.open(folder, "exact")
    exact.search(queries[:1], K)  # lengths of all vectors, once
    (truth, _), seconds = timed(lambda: exact.search(queries, K))
    found["searched"].append({"kind": "exact", "probes": None, "recall": 1.0, "per_second": QUERIES / seconds})
    for count in probes:
        index.probes = min(count, index.cells)
        (rows_found, _), seconds = timed(lambda: index.search(queries, K))
        hits = (rows_found[:, :, None] == truth[:, None]).any(-1).float().mean()
        found["searched"].append(
            {"kind": "ivf", "probes": index.probes, "recall": float(hits), "per_second": QUERIES / seconds}
        )
    return found


def page(results: list[dict], threads: int) -> str:
    first = results[0]
    dim, measured = first["dim"], first["rows"]
    names = {"normal": "normal", "centres": "around centres"}
    table = "\n".join(
        f"| {names[one['vectors']]} | {row['kind']} | {row['probes'] or 'all vectors'} | {row['recall']:.3f} | "
        f"{row['per_second']:.1f} |"
        for one in results
        for row in one["searched"]
    )
    built = "\n".join(
        f"| {names[one['vectors']]} | {row['kind']}, {row['cells']} cells | {row['seconds']:.0f} | "
        f"{row['gigabytes']:.2f} | {row['open_seconds']:.2f} | {row['peak_gigabytes']:.1f} |"
        for one in results
        for row in one["built"]
    )
    exact = next(row for row in first["searched"] if row["kind"] == "exact")
    sizes = [10**6, 2 * 10**7, 10**9]
    lines = {
        "vectors on disk, GB": [f"{size * dim * 2 / 1e9:,.0f}" for size in sizes],
        "lists on disk, GB": [f"{size * (dim * 2 + 8) / 1e9:,.0f}" for size in sizes],
        "parts of 1e6": [f"{size // 10**6:,}" for size in sizes],
        "cells": [f"{round(size**0.5):,}" for size in sizes],
        "cells in memory, MB": [f"{round(size**0.5) * dim * 4 / 1e6:,.0f}" for size in sizes],
        "vectors a query reads at 64 lists": [f"{round(64 * size / round(size**0.5)):,}" for size in sizes],
        "of which on disk, GB": [f"{64 * size / round(size**0.5) * dim * 2 / 1e9:,.2f}" for size in sizes],
        "exact, CPU seconds a query in a batch": [f"{size / measured / exact['per_second']:,.2f}" for size in sizes],
        "20 neighbours of as many images, GB": [f"{size * 20 * 8 / 1e9:,.1f}" for size in sizes],
    }
    plan = "\n".join(f"| {name} | {' | '.join(values)} |" for name, values in lines.items())
    told = {"rows": measured, "dim": dim, "k": K, "queries": QUERIES, "threads": threads, "s": "s" * (threads > 1)}
    return PAGE.format(table=table, built=built, plan=plan, centres=CENTRES, **told)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default="outputs/retrieval", help="folder of the indices")
    parser.add_argument("--results", default="outputs/retrieval-results", help="folder of load.json and README.md")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vectors", nargs="+", default=["normal", "centres"], choices=["normal", "centres"])
    parser.add_argument("--probes", nargs="+", type=int, default=[16, 64, 250])
    args = parser.parse_args(argv)
    results, place = [], Path(args.results)
    for kind in args.vectors:
        results.append(measure(Path(args.work), args.rows, args.dim, kind, args.probes))
        print(json.dumps(results[-1]), flush=True)
        place.mkdir(parents=True, exist_ok=True)
        (place / "load.json").write_text(json.dumps(results, indent=2) + "\n")
        (place / "README.md").write_text(page(results, torch.get_num_threads()))


if __name__ == "__main__":
    run_script(main)
