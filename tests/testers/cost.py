"""What tests cost: CPU seconds by file, shown at the end, recorded on request, held against a budget.

A pytest plugin (`-p tests.testers.cost`); as a script it checks the record: `python -m tests.testers.cost`. The same
tests cost up to twice as much in another hour of a shared machine. So a fixed piece of work is timed between them, all
through the run; the record tells how many times slower it was than in the run that the budgets were made by, and the
check divides by that.
"""

import ast
import itertools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "cpu_seconds.json"
BUDGET = 30.0  # CPU seconds of a file
WHOLE_BUDGET = 1260.0  # of a run, imports and collection included; 21 systems more than at 840, 20 each
# Entries that may cost more, and why they are not two.
DEARER: dict[str, tuple[float, str]] = {
    "diffusers_repr": (60.0, "the doctests of all the package are one entry"),
    "two processes": (45.0, "one launch of two processes, each of which imports all, serves four files"),
}
SHARED = {"together": "two processes"}  # fixtures that serve several files, whichever asks first
WHOLE = "whole run"  # the entry of all processes from start to end
SLOWER = "times slower"  # the entry of how many times slower the fixed work was
# CPU seconds of the fixed work in the run that the budgets were made by (771 s in all). It was not timed there but
# derived later: 0.0059 s in a run in which 122 untouched files of tests cost 0.84 of what they had.
REFERENCE = 0.0070
EVERY = 40  # tests of a process from one piece of the fixed work to the next
SHOWN = 10

_costs: dict[str, float] = defaultdict(float)
_shared: dict[str, float] = defaultdict(float)
_workers: list[float] = []
_probes: list[float] = []  # CPU seconds of each piece of the fixed work
_tests = itertools.count()


def fixed_work() -> float:
    """CPU seconds of work that no change of the package changes: Python's loops, torch's dispatch and products."""
    before = time.thread_time()
    matrix = torch.full((96, 96), 0.01)
    for _ in range(150):
        matrix = torch.tanh(matrix @ matrix + 0.1)
    sum(at * at for at in range(60_000))
    return time.thread_time() - before


def spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def entry(nodeid: str) -> str:
    """What a test is counted under: its file, or for doctests the package."""
    file = nodeid.split("::")[0]
    return file if file.startswith("tests/") else file.split("/")[0]


def pytest_addoption(parser):
    parser.addoption(
        "--record-cost", action="store_true", help=f"write the CPU seconds of every file to {RECORD.name}"
    )


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        return
    if config.getoption("--record-cost") and config.args_source is not config.ArgsSource.TESTPATHS:
        raise pytest.UsageError("--record-cost writes the record of a whole run; name no files, or leave it out.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    if next(_tests) % EVERY == 0:
        _probes.append(fixed_work())
    item.stash[_START] = spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    if fixturedef.argname not in SHARED:
        return (yield)
    before = spent()
    try:
        return (yield)
    finally:
        _shared[SHARED[fixturedef.argname]] += spent() - before


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    # A report travels from a worker to the main process with all its attributes.
    report = yield
    now = spent()
    report.shared_seconds = dict(_shared)
    report.cpu_seconds = now - item.stash.get(_START, now) - sum(_shared.values())
    _shared.clear()
    item.stash[_START] = now
    return report


def pytest_runtest_logreport(report):
    _costs[entry(report.nodeid)] += getattr(report, "cpu_seconds", 0.0)
    for name, seconds in getattr(report, "shared_seconds", {}).items():
        _costs[name] += seconds


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    output = getattr(node, "workeroutput", {})
    _workers.append(output.get("cpu_seconds", 0.0))
    _probes.extend(output.get("probes", ()))


def whole() -> float:
    """CPU seconds of the run so far; workers tell theirs, whether or not this process has reaped them."""
    return sum(os.times()[:2]) + sum(_workers) if _workers else spent()


def slower() -> float:
    """How many times slower than in the run that the budgets were made by; the median of all probes."""
    return statistics.median(_probes) / REFERENCE


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "workerinput") or len(_costs) < 2:
        return
    dearest = sorted(_costs.items(), key=lambda cost: -cost[1])
    terminalreporter.section(f"dearest files of {len(_costs)}, CPU seconds")
    for file, seconds in dearest[:SHOWN]:
        terminalreporter.write_line(f"{seconds:8.1f}  {file}")
    terminalreporter.write_line(f"{sum(_costs.values()):8.1f}  all tests")
    terminalreporter.write_line(f"{whole():8.1f}  {WHOLE}, imports and collection included")
    if _probes:
        terminalreporter.write_line(f"{slower():8.2f}  {SLOWER} than in the run that the budgets were made by")


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workerinput"):
        config.workeroutput |= {"cpu_seconds": spent(), "probes": _probes}
    elif config.getoption("--record-cost") and exitstatus <= pytest.ExitCode.TESTS_FAILED and not session.shouldfail:
        config.stash[_RECORDS] = True


def pytest_unconfigure(config):
    if config.stash.get(_RECORDS, False):  # the workers have told theirs by now
        rounded = {name: round(_costs[name], 1) for name in sorted(_costs)}
        run = {WHOLE: round(whole(), 1), SLOWER: round(slower(), 2)}
        RECORD.write_text(json.dumps({**rounded, **run}, indent=1) + "\n", encoding="utf-8")


def problems(record: dict[str, float], files: set[str]) -> list[str]:
    """What is wrong with a recorded run: entries beyond their budget, files that it lacks or that are gone."""
    found = []
    budgets = {WHOLE: WHOLE_BUDGET, **{name: limit for name, (limit, _) in DEARER.items()}}
    slow = record.get(SLOWER, 1.0)
    for name, seconds in sorted(record.items()):
        limit = budgets.get(name, BUDGET)
        if name != SLOWER and seconds / slow > limit:
            told = f"{seconds} CPU seconds" if slow == 1 else f"{seconds} / {slow} = {seconds / slow:.1f} CPU seconds"
            found.append(f"{name}: {told} of {limit:g}. Make its tests cheaper, or split it by idea.")
    gone = {name for name in record if name.startswith("tests/")} - files
    found += [f"{file} is not in the record: it is older than the file." for file in sorted(files - set(record))]
    found += [f"{file} is in the record and no more here." for file in sorted(gone)]
    return found


def has_fast_tests(source: str) -> bool:
    """Does a file of tests have one that is not marked `slow`: itself, by its class or by `pytestmark`?"""
    tree = ast.parse(source)

    def slow(*marks: ast.AST) -> bool:
        """By a mark, or a list of them; not where one case of a `parametrize` is slow."""
        return any(
            isinstance(n, ast.Attribute) and n.attr == "slow"
            for mark in marks if "parametrize" not in ast.unparse(mark)
            for n in ast.walk(mark)
        )  # fmt: skip

    def fast(parts: list[ast.stmt]) -> bool:
        if any(slow(n) for n in parts if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "pytestmark"):
            return False
        return any(
            fast(part.body) if isinstance(part, ast.ClassDef) and part.body and not part.bases
            else isinstance(part, ast.ClassDef) or (isinstance(part, ast.FunctionDef) and part.name.startswith("test"))
            for part in parts
            if not slow(*getattr(part, "decorator_list", []))
        )  # fmt: skip

    return fast(tree.body)


def files_to_record(root: Path) -> set[str]:
    """Files of tests, as seen from the root, that have tests of the fast suite: the recorded run sees no others."""
    files = (root / "tests").rglob("test_*.py")
    return {f.relative_to(root).as_posix() for f in files if has_fast_tests(f.read_text(encoding="utf-8"))}


def check(root: Path) -> list[str]:
    """The problems of a checkout."""
    record = root / "tests" / RECORD.name
    if not record.is_file():
        return [f"There is no {record.relative_to(root)}."]
    return problems(json.loads(record.read_text(encoding="utf-8")), files_to_record(root))


def main() -> int:
    found = check(ROOT)
    if found:
        print(*found, "`make test RECORD=1` records a run anew; commit the file.", sep="\n", file=sys.stderr)
    return int(bool(found))


_START = pytest.StashKey[float]()
_RECORDS = pytest.StashKey[bool]()

if __name__ == "__main__":
    sys.exit(main())
