"""Folders to the Hub and back over HTTP, by the real client; each test is one client process."""

import json

import pytest

from tests.testers.hub_server import hub_env, hub_server, run_python

PREPARE = """
import json, os, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file
from diffusers_repr import hub
assert "torch" not in sys.modules
work = Path(os.environ["WORK"])
def refused(kind, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        assert type(error) is kind, repr(error)
        return str(error)
    raise AssertionError(f"{call.__name__}{args} did not raise {kind.__name__}")
"""

ROUND_TRIP = """
from huggingface_hub import HfApi, ModelCard, hf_hub_download

folder = work / "probe"
weights = {"w": np.random.default_rng(0).standard_normal(700_000).astype(np.float32)}
metric = hub.Metric("accuracy", 0.875, dataset="Digits")
hub.write_json(folder / "head" / "config.json", {"layers": ["mid_block"]})
save_file(weights, folder / "head" / "model.safetensors")
hub.atomic_write(folder / "README.md", hub.model_card(title="Probe", text="Text.", metrics=[metric], base_model="a/b"))
(folder / "__pycache__").mkdir()
(folder / "__pycache__" / "x.pyc").write_bytes(b"x")
(folder / ".config.json.abc.tmp").write_text("x")
hub.atomic_write(folder / "checkpoint-00000004" / "state.json", "x")

report, parts = {}, ["head/*.json", "head/model.safetensors"]
report["first"] = hub.push_folder(folder, "user/probe", include=parts)
report["again"] = hub.push_folder(folder, "user/probe", include=parts)
loaded = hub.resolve_folder("user/probe")
assert np.array_equal(load_file(loaded / "head" / "model.safetensors")["w"], weights["w"])
assert hub.read_json(loaded / "head" / "config.json") == {"layers": ["mid_block"]}
assert hub.load_json_config("user/probe", "head/config.json") == {"layers": ["mid_block"]}
assert ModelCard.load("user/probe").data.eval_results == [metric.to_eval_result()]
report["files"] = sorted(HfApi().list_repo_files("user/probe"))

hub.write_json(folder / "head" / "config.json", {"layers": ["up_blocks.1"]})
report["second"] = hub.push_folder(folder, "user/probe", include=parts, commit_message="New layer")
first, second = (report[key].rsplit("/", 1)[1] for key in ("first", "second"))
assert hub.load_json_config("user/probe", "head/config.json", revision=first) == {"layers": ["mid_block"]}
for revision in (None, "main", second):
    assert hub.load_json_config("user/probe", "head/config.json", revision) == {"layers": ["up_blocks.1"]}
assert hub.read_json(hub.resolve_folder("user/probe", first) / "head" / "config.json") == {"layers": ["mid_block"]}

hub.push_folder(folder / "head", "user/probe", revision="small", create=True)
report["small"] = sorted(HfApi().list_repo_files("user/probe", revision="small"))
only = hub.resolve_folder("user/probe", revision="small", allow_patterns="config.json")
report["only"] = sorted(path.name for path in only.iterdir() if path.is_file())
print(json.dumps(report))
"""

DATASET = """
import pyarrow as pa, pyarrow.parquet as pq
from datasets import load_dataset

folder = work / "features"
(folder / "data").mkdir(parents=True)
for split, rows in (("train", 6), ("test", 3)):
    table = pa.table({"id": list(range(rows)), "feature": [[float(i)] * 4 for i in range(rows)]})
    pq.write_table(table, folder / "data" / f"{split}-00000.parquet")
files = {split: f"data/{split}-*.parquet" for split in ("train", "test")}
card = hub.dataset_card(title="Features", text="Text.", num_rows=9, data_files=files)
hub.atomic_write(folder / "README.md", card)
url = hub.push_folder(folder, "user/features", include="data/*.parquet", repo_type="dataset", private=True)
assert hub.resolve_folder("user/features", repo_type="dataset").joinpath("data").is_dir()
data = load_dataset("user/features")
print(json.dumps({"url": url, "rows": {split: part.num_rows for split, part in data.items()}, "row": data["test"][2]}))
"""

ERRORS = """
HubError, report, named = hub.HubError, {}, ["list.json", "model.safetensors"]
(work / "empty" / "__pycache__").mkdir(parents=True)
(work / "empty" / "__pycache__" / "x.pyc").write_bytes(b"x")
full = work / "full"
hub.write_json(full / "list.json", [1])
hub.push_folder(full, "user/there", include=["list.json"])
(work / "bad_card").mkdir()
(work / "bad_card" / "README.md").write_text("---\\na: [1\\n---\\n")

# before any request
report["empty"] = refused(ValueError, hub.push_folder, work / "empty", "user/x", include="*.json")
report["no folder"] = refused(FileNotFoundError, hub.push_folder, work / "none", "user/x")
report["a file"] = refused(NotADirectoryError, hub.push_folder, full / "list.json", "user/x")
for bad in ("bare", "a/b/c", "user/-x", "user/a..b", ""):
    report["bad id"] = refused(ValueError, hub.push_folder, full, bad, include=named)
report["bad type"] = refused(ValueError, hub.push_folder, full, "user/x", repo_type="models", include=named)
report["to a commit"] = refused(ValueError, hub.push_folder, full, "user/x", revision="0" * 40, include=named)
report["neither"] = refused(ValueError, hub.resolve_folder, "a/b/c")
report["path"] = refused(FileNotFoundError, hub.resolve_folder, "./none")
report["file"] = refused(NotADirectoryError, hub.resolve_folder, str(full / "list.json"))
report["local revision"] = refused(ValueError, hub.resolve_folder, full, revision="main")
report["local file"] = refused(FileNotFoundError, hub.load_json_config, full, "config.json")
report["no object"] = refused(ValueError, hub.load_json_config, "user/there", "list.json")

# answers of the Hub
report["no repo"] = refused(HubError, hub.resolve_folder, "user/missing")
report["no repo, file"] = refused(HubError, hub.load_json_config, "user/missing")
report["other type"] = refused(HubError, hub.resolve_folder, "user/there", repo_type="dataset")
report["no revision"] = refused(HubError, hub.resolve_folder, "user/there", "v9")
report["no revision, file"] = refused(HubError, hub.load_json_config, "user/there", "list.json", "v9")
report["no file"] = refused(HubError, hub.load_json_config, "user/there", "config.json")
report["no match"] = refused(HubError, hub.resolve_folder, "user/there", allow_patterns=["*.bin"])
report["gated"] = refused(HubError, hub.resolve_folder, "other/gated")
report["gated, file"] = refused(HubError, hub.load_json_config, "other/gated")
report["not mine"] = refused(HubError, hub.push_folder, full, "other/x", include=named)
report["not there"] = refused(HubError, hub.push_folder, full, "user/y", create=False, include=named)
report["bad card"] = refused(ValueError, hub.push_folder, work / "bad_card", "user/x", include="none.json")
other, wrong = os.environ["READ_TOKEN"], "hf_" + "0" * 30
report["read token"] = refused(HubError, hub.push_folder, full, "user/x", token=other, include=named)
report["wrong token"] = refused(HubError, hub.push_folder, full, "user/x", token=wrong, include=named)
hub.push_folder(full, "user/elsewhere", include=["list.json"])
report["wrong token, load"] = refused(HubError, hub.resolve_folder, "user/elsewhere", token=wrong)

# the Hub fails in the middle of an upload
save_file({"w": np.ones(9)}, full / "model.safetensors")
report["broken storage"] = refused(HubError, hub.push_folder, full, "user/broken", include=named)
print(json.dumps(report))
"""

NO_TOKEN = """
full = work / "full"
hub.write_json(full / "config.json", {})
report = {"push": refused(hub.HubError, hub.push_folder, full, "user/x")}
report["private"] = refused(hub.HubError, hub.resolve_folder, "user/private")
assert hub.load_json_config("user/public", "config.json") == {"a": 1}
hub.resolve_folder("user/public")

# the same process, cut off: the cache still serves what it holds
import huggingface_hub.constants as constants
from tests.testers.hosts import close_session
constants.HF_HUB_OFFLINE = True
close_session()
assert hub.load_json_config("user/public", "config.json") == {"a": 1}
assert (hub.resolve_folder("user/public") / "config.json").is_file()
report["offline"] = refused(hub.HubError, hub.resolve_folder, "user/other")
report["offline, file"] = refused(hub.HubError, hub.load_json_config, "user/public", "other.json")
report["offline, push"] = refused(hub.HubError, hub.push_folder, full, "user/x", token="hf_" + "0" * 30)
print(json.dumps(report))
"""

NO_NETWORK = """
full = work / "full"
hub.write_json(full / "config.json", {})
report = {"push": refused(hub.HubError, hub.push_folder, full, "user/x", token="hf_" + "0" * 30)}
report["load"] = refused(hub.HubError, hub.resolve_folder, "user/x")
report["file"] = refused(hub.HubError, hub.load_json_config, "user/x")
assert hub.resolve_folder(full) == full
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def server():
    with hub_server() as running:
        yield running


def run_report(code, env):
    done = run_python(PREPARE + code, env)
    assert done.returncode == 0, done.stderr
    for token in {env.get("HF_TOKEN"), env.get("READ_TOKEN"), "hf_" + "0" * 30} - {None}:
        assert token not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def holds(folder, text):
    """Files below `folder` that hold `text`."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_model_round_trip(server, tmp_path):
    report = run_report(ROUND_TRIP, hub_env(server, tmp_path, WORK=tmp_path))
    assert report["files"] == [".gitattributes", "README.md", "head/config.json", "head/model.safetensors"]
    assert report["again"] == report["first"] != report["second"]
    assert report["second"].startswith(f"{server.url}/user/probe/commit/")
    assert "config.json" in report["small"]
    assert "model.safetensors" in report["small"]
    assert report["only"] == ["config.json"]

    repo = server.store.repos["model", "user/probe"]
    assert repo.commits[repo.branches["main"]]["head/model.safetensors"].sha256 is not None
    assert list(repo.titles.values())[:3] == ["initial commit", "Upload with diffusers-repr", "New layer"]

    # tokens go to the Hub only: not to the storage of large files, not to disk
    stored = [request for request in server.requests if request[1].startswith("/storage/")]
    assert {request[0] for request in stored} >= {"PUT", "GET"}
    assert all(token is None and host.startswith("localhost") for _, _, host, token in stored)
    assert holds(tmp_path, server.token) == []


def test_dataset_round_trip(server, tmp_path):
    report = run_report(DATASET, hub_env(server, tmp_path, WORK=tmp_path))
    assert report["url"].startswith(f"{server.url}/datasets/user/features/commit/")
    assert report["rows"] == {"train": 6, "test": 3}
    assert report["row"] == {"id": 2, "feature": [2.0] * 4}
    assert server.store.repos["dataset", "user/features"].private
    assert holds(tmp_path, server.token) == []


def test_errors_name_cause_and_remedy(server, tmp_path):
    gated = server.store.create("model", "other/gated", gated=True)
    server.store.add_file(gated, "config.json", b"{}")
    server.broken_storage = True
    try:
        report = run_report(ERRORS, hub_env(server, tmp_path, WORK=tmp_path, READ_TOKEN=server.read_token))
    finally:
        server.broken_storage = False
    expected = {
        "empty": "has no file to push",
        "no folder": "There is no folder",
        "a file": "is a file",
        "bad id": "is no repository id to push to",
        "bad type": "allowed are 'model', 'dataset'",
        "to a commit": "Give a branch",
        "neither": "neither a folder here nor a Hub id",
        "path": "There is no folder './none'",
        "file": "is a file",
        "local revision": "has no revisions",
        "local file": "JSON files in that folder: list.json",
        "no object": "holds a JSON list",
        "no repo": "Cannot load model repository 'user/missing' (no local folder has this name): there is no such",
        "no repo, file": "Cannot load model repository 'user/missing'",
        "other type": "Cannot load dataset repository 'user/there'",
        "no revision": "no revision 'v9'",
        "no revision, file": "no revision 'v9'",
        "no file": "has no file 'config.json' at revision 'main'",
        "no match": "matches ['*.bin']",
        "gated": "the repository is gated",
        "gated, file": "the repository is gated",
        "not mine": "(403)",
        "not there": "Cannot push to model repository 'user/y': there is no such repository",
        "bad card": "Invalid metadata in README.md",
        "read token": "kind 'write'",
        "wrong token": "did not accept the token",
        "wrong token, load": "did not accept the token",
        "broken storage": "answered with error 507",
    }
    assert list(report) == list(expected)
    assert {key: text for key, text in report.items() if expected[key] not in text} == {}
    assert set(server.store.repos) & {("model", "user/x"), ("model", "other/x")} <= {("model", "user/x")}


def test_without_token_and_offline(server, tmp_path):
    public = server.store.create("model", "user/public")
    server.store.add_file(public, "config.json", b'{"a": 1}')
    server.store.create("model", "user/private", private=True)
    report = run_report(NO_TOKEN, hub_env(server, tmp_path, token=None, WORK=tmp_path))
    assert "no Hub token was found" in report["push"]
    assert "hf auth login" in report["push"]
    assert "it is private and no token was sent" in report["private"]
    assert "HF_HUB_OFFLINE is set and revision 'main' is not in the cache" in report["offline"]
    assert "no file 'other.json' at revision 'main' in the cache, and HF_HUB_OFFLINE" in report["offline, file"]
    assert "HF_HUB_OFFLINE is set" in report["offline, push"]


def test_no_network(tmp_path):
    with hub_server() as gone:
        address = gone.url
    report = run_report(NO_NETWORK, hub_env(address, tmp_path, WORK=tmp_path))
    for text in report.values():
        assert f"no connection to the Hub at {address}" in text
        assert "local folder" in text
        assert "Check the connection" in text
