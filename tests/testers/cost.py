"""What tests cost: CPU seconds by file, shown at the end, recorded on request, held against a budget.

A pytest plugin (`-p tests.testers.cost`); as a script it checks the record: `python -m tests.testers.cost`.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "cpu_seconds.json"
BUDGET = 30.0  # CPU seconds of a file
# Files that cost more, and why they are not two.
DEARER: dict[str, tuple[float, str]] = {}
SHOWN = 10

_costs: dict[str, float] = defaultdict(float)


def spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def pytest_addoption(parser):
    parser.addoption(
        "--record-cost", action="store_true", help=f"write the CPU seconds of every file to {RECORD.name}"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    item.stash[_START] = spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    # A report travels from a worker to the main process with all its attributes.
    report = yield
    now = spent()
    report.cpu_seconds = now - item.stash.get(_START, now)
    item.stash[_START] = now
    return report


def pytest_runtest_logreport(report):
    _costs[report.nodeid.split("::")[0]] += getattr(report, "cpu_seconds", 0.0)


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "workerinput") or len(_costs) < 2:
        return
    dearest = sorted(_costs.items(), key=lambda cost: -cost[1])
    terminalreporter.section(f"dearest files of {len(_costs)}, CPU seconds")
    for file, seconds in dearest[:SHOWN]:
        terminalreporter.write_line(f"{seconds:8.1f}  {file}")
    terminalreporter.write_line(f"{sum(_costs.values()):8.1f}  all tests")


def pytest_sessionfinish(session, exitstatus):
    config = session.config
    if hasattr(config, "workerinput") or not config.getoption("--record-cost"):
        return
    rounded = {file: round(_costs[file], 1) for file in sorted(_costs)}
    RECORD.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")


def problems(record: dict[str, float], files: set[str]) -> list[str]:
    """What is wrong with a recorded run: files beyond their budget, and files that it does not know."""
    found = []
    for file, seconds in sorted(record.items()):
        limit, _ = DEARER.get(file, (BUDGET, ""))
        if seconds > limit:
            found.append(f"{file} took {seconds} CPU seconds of {limit:g}.")
    found += [f"{file} is not in the record." for file in sorted(files - set(record))]
    return found


def main() -> int:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    files = {file.relative_to(ROOT).as_posix() for file in (ROOT / "tests").rglob("test_*.py")}
    found = problems(record, files)
    if found:
        print(*found, "Make tests cheaper, then `make test RECORD=1`.", sep="\n", file=sys.stderr)
    return int(bool(found))


_START = pytest.StashKey[float]()

if __name__ == "__main__":
    sys.exit(main())
