"""Base and probe to the Hub and back over HTTP, by the real client."""

import json

import pytest
from huggingface_hub import constants

from diffusers_repr.cli import main
from tests.testers.hosts import close_session
from tests.testers.hub_server import hub_env, hub_server, run_python

ROUND_TRIP = """
import json, os, warnings
from pathlib import Path
import torch
from huggingface_hub import HfApi, ModelCard
from diffusers_repr.cli import main
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import LinearHead
from diffusers_repr.hub import HubError, push_folder
from diffusers_repr.encoders import load_encoder
from diffusers_repr.tasks import Probe, RepresentationProbe
from tests.tasks.planted import dataset, images, pipeline

work, report = Path(os.environ["WORK"]), {}
x, settings = images(6, seed=3)[0], {"layers": ["mid_block"], "timestep": 50, "protocol": "ridge"}
pipeline().save_pretrained(work / "base")
push_folder(work / "base", "user/base")

# base and probe from the Hub; the commit of the base is written
probe = Probe.fit(Denoiser.from_pretrained("user/base"), dataset(30), **settings)
report["scores"] = probe.evaluate(dataset(30, seed=2), dataset="Sides", split="test")
report["url"] = probe.push_to_hub("user/probe")
report["files"] = sorted(HfApi().list_repo_files("user/probe"))
base = probe.recipe.base
assert base.name == "user/base" and not base.local and base.commit == HfApi().model_info("user/base").sha, base
loaded = Probe.from_pretrained("user/probe")
assert torch.equal(loaded(x).probabilities, probe(x).probabilities)
assert torch.equal(LinearHead.from_pretrained("user/probe").linear.weight, probe.head.linear.weight)
probe.head.push_to_hub("user/head")
assert torch.equal(LinearHead.from_pretrained("user/head").linear.weight, probe.head.linear.weight)
card = ModelCard.load("user/probe")
report["card"] = {r.metric_type: [r.metric_value, r.dataset_name, r.dataset_split] for r in card.data.eval_results}
report["base_model"], report["content"] = card.data.base_model, card.content

# a head on an encoder, which is a layer of the base
encoder = load_encoder("user/base:mid_block@50")
head = RepresentationProbe.fit(encoder, dataset(12), beside=[], protocol="ridge")
head.push_to_hub("user/representation")
report["head_files"] = sorted(HfApi().list_repo_files("user/representation"))
again = RepresentationProbe.from_pretrained("user/representation")
assert torch.equal(again(x), head(x))
assert again.encoder.place == "user/base:mid_block@50"
here = RepresentationProbe.fit(load_encoder(f"{work}/base:mid_block@50"), dataset(12), beside=[], protocol="ridge")
here.save_pretrained(work / "head")
assert main(["push", str(work / "head"), "user/moved-head", "--base", "user/base"]) == 0
assert torch.equal(RepresentationProbe.from_pretrained("user/moved-head")(x), head(x))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    here.push_to_hub("user/lost-head")
report["lost"] = [str(w.message) for w in caught if w.category is UserWarning]
assert str(work) not in ModelCard.load("user/lost-head").content

# the base moves on; the probe keeps the commit it was fitted on
pipeline(seed=1).save_pretrained(work / "other")
push_folder(work / "other", "user/base")
with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert torch.equal(Probe.from_pretrained("user/probe")(x).probabilities, probe(x).probabilities)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Probe.from_pretrained("user/probe", base="user/base")
report["moved"] = [str(w.message) for w in caught if w.category is UserWarning]

# a pipeline that was loaded by its id is known by its id
from diffusers import DDPMPipeline
pipe = DDPMPipeline.from_pretrained("user/base")
report["from_pipe"] = Probe.fit(pipe, images(12), **settings).recipe.base.name

# a local base: told, and named anew by the command
local = Probe.fit(Denoiser.from_pretrained(work / "base"), images(12), **settings)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    local.push_to_hub("user/local")
report["local"] = [str(w.message) for w in caught if w.category is UserWarning]
local.save_pretrained(work / "probe")
assert main(["push", str(work / "probe"), "user/named", "--base", "user/base", "--private"]) == 0
named = Path(HfApi().snapshot_download("user/named"))
report["named"] = json.loads((named / "probe.json").read_text())["base"]["name"]
report["private"] = HfApi().model_info("user/named").private

# the command tells a store, a pipeline and a custom pipeline apart
(work / "data").mkdir()
dataset(6).to_parquet(work / "data" / "train.parquet")
store, reads = str(work / "store"), ["--layers", "mid_block", "--timesteps", "50"]
assert main(["extract", str(work / "base"), str(work / "data"), *reads, "--out", store]) == 0
(work / "custom").mkdir()
(work / "custom" / "pipeline.py").write_text("import diffusers\\nclass X(diffusers.DiffusionPipeline): ...\\n")
for folder, repo_id in {"store": "user/store", "other": "user/pipe", "custom": "user/custom"}.items():
    assert main(["push", str(work / folder), repo_id]) == 0
report["store"] = HfApi().list_repo_files("user/store", repo_type="dataset")
report["pipe"], report["custom"] = (HfApi().list_repo_files(f"user/{name}") for name in ("pipe", "custom"))

# the base disappears
HfApi().create_repo("user/empty")
gone = Probe.fit(Denoiser.from_pretrained(work / "base"), images(12), base="user/gone", **settings)
gone.push_to_hub("user/orphan")
try:
    Probe.from_pretrained("user/orphan")
except HubError as error:
    report["gone"] = str(error)
try:
    Probe.from_pretrained("user/nothing")
except HubError as error:
    report["nothing"] = str(error)
try:
    Probe.from_pretrained("user/empty")
except OSError as error:
    report["empty"] = str(error)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with hub_server() as server:
        done = run_python(ROUND_TRIP, hub_env(server, folder, WORK=folder, OMP_NUM_THREADS=1), timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_probe_goes_to_the_hub_and_back(report):
    assert "/user/probe/commit/" in report["url"]
    assert set(report["files"]) == {
        ".gitattributes",
        "README.md",
        "config.json",
        "diffusers_repr_linear.py",
        "diffusion_pytorch_model.safetensors",
        "probe.json",
    }


def test_a_head_on_an_encoder_goes_to_the_hub_and_back(report):
    sent = {"README.md", "representation.json", "head/config.json", "head/diffusion_pytorch_model.safetensors"}
    assert set(report["head_files"]) - {".gitattributes", "head/diffusers_repr_linear.py"} == sent
    assert len(report["lost"]) == 1
    assert "encoder is 'base', which is not on the Hub" in report["lost"][0]


def test_the_card_on_the_hub_has_metrics_and_base(report):
    scores = report["scores"]
    assert report["card"] == {
        name: [pytest.approx(scores[name], rel=1e-5), "Sides", "test"] for name in ("accuracy", "balanced_accuracy")
    }
    assert report["base_model"] == "user/base"
    assert 'Probe.from_pretrained("user/probe")' in report["content"]


def test_the_base_is_that_of_the_recorded_commit(report):
    assert len(report["moved"]) == 1
    assert "has other weights than the probe's base" in report["moved"][0]
    assert report["from_pipe"] == "user/base"


def test_a_local_base_is_told_and_can_be_named(report):
    assert len(report["local"]) == 1
    assert "not on the Hub" in report["local"][0]
    assert report["named"] == "user/base"
    assert report["private"] is True


def test_the_command_pushes_each_kind_to_its_place(report):
    assert "manifest.json" in report["store"]
    assert "model_index.json" in report["pipe"]
    assert "pipeline.py" in report["custom"]


def test_what_is_not_there_is_told(report):
    assert "needs its base model 'user/gone'" in report["gone"]
    assert "Pass base=" in report["gone"]
    assert "user/nothing" in report["nothing"]
    assert "user/empty" in report["empty"]


def test_without_a_network(tmp_path, monkeypatch, capsys):
    image = tmp_path / "image.png"
    image.write_bytes(b"x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    try:
        assert main(["predict", "user/probe", str(image)]) == 2
    finally:
        close_session()
    told = capsys.readouterr().err
    assert "diffusers-repr predict: Cannot load model repository 'user/probe'" in told
    assert "no connection to the Hub at http://127.0.0.1:9" in told
    assert "Traceback" not in told
