"""Settings of every test process, and the markers that need something a machine may not have."""

import gc
import json
import os

# Child processes find `tests`, and start faster.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [os.path.dirname(os.path.dirname(__file__)), f"{os.path.dirname(__file__)}/testers/children",
                  os.environ.get("PYTHONPATH")])
)  # fmt: skip
# One thread a process, children included: two workers with two threads each wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Nothing may reach out; tests that use a Hub start their own server and say so to their processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch
from filelock import FileLock

from tests.testers.two_processes import launch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU; none here"))
        if item.get_closest_marker("hub") and os.environ["HF_HUB_OFFLINE"] == "1":
            item.add_marker(pytest.mark.skip(reason="needs the network; run with HF_HUB_OFFLINE=0"))


def pytest_collection_finish():
    # What is imported by now stays to the end. Each end of a training run collects garbage twice, whole; without this
    # that alone takes seconds.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)  # as in children


@pytest.fixture(scope="session")
def together(tmp_path_factory):
    """`(folder, told)` of two processes that did what tests/testers/two_processes.py says; once for all workers."""
    place = tmp_path_factory.getbasetemp()
    place = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "together"
    with FileLock(f"{place}.lock"):
        if not (place / "told.json").is_file():
            place.mkdir()
            launch(place)
    return place, json.loads((place / "told.json").read_text())
