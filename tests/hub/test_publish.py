"""Publishing against the local Hub: all of it, again, and back by Hub id; each client is a process of its own."""

import json
import shutil

import pytest

from diffusers_repr.hub.own_pipelines import own_pipeline_class, pipeline_files, scheduler_files
from diffusers_repr.hub.publish import Publication, publish
from diffusers_repr.hub.scheduler_file import check_scheduler_file, stage_scheduler
from tests.pipelines.sit_cases import pipeline
from tests.testers.hosts import before
from tests.testers.hub_server import hub_env, hub_server, run_python
from tests.testers.models import saved

PREPARE = """
import contextlib, io, json, os, shutil, sys
from pathlib import Path
from diffusers_repr.cli import publish, read_settings

work, report = Path(os.environ["WORK"]), {}
def command(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = publish.run(read_settings("publish", words))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}
"""

ALL = """
report["dry"] = command("--namespace", "user", "--dry_run")
report["first"] = command("--namespace", "user", "--folder", str(work / "sit-model"))
report["again"] = command("--namespace", "user", "--folder", str(work / "sit-model"))
(work / "sit-model" / "README.md").write_text("---\\nlicense: mit\\n---\\nNew.")
report["changed"] = command("--namespace", "user", "--only", "models", "--folder", str(work / "sit-model"))
print(json.dumps(report))
"""

LOAD = """
import inspect, json, os
from pathlib import Path
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from diffusers_repr.hub import push_folder, resolve_folder, read_json, write_json

asks = "trust_remote_code" in inspect.signature(get_class_from_dynamic_module).parameters  # from diffusers 0.38 on
consent = {"trust_remote_code": True} if asks else {}
work, report = Path(os.environ["WORK"]), {}
for name, model in json.loads(os.environ["MODELS"]).items():
    custom = {"custom_pipeline": f"user/{name}", "trust_remote_code": True}
    if model is None:
        cls = get_class_from_dynamic_module(f"user/{name}", "pipeline.py", **consent)
        report[name] = cls.__name__
        continue
    pipe = DiffusionPipeline.from_pretrained(model, **custom)
    assert type(pipe).__module__.startswith("diffusers_modules"), type(pipe).__module__
    report[name] = type(pipe).__name__

# a model of ours, whole, by the package and by the published file
from diffusers_repr.pipelines.sit import SiTPipeline
pipe = SiTPipeline.from_pretrained("user/sit-model")
call = {"class_labels": 1, "num_inference_steps": 2, "output_type": "latent"}
want = pipe(**call, generator=torch.Generator().manual_seed(0)).images
again = DiffusionPipeline.from_pretrained(
    resolve_folder("user/sit-model"), custom_pipeline="user/sit", trust_remote_code=True
)
assert torch.equal(again(**call, generator=torch.Generator().manual_seed(0)).images, want)
assert type(again) is not SiTPipeline

# a scheduler by itself, as its card says, and carried by a pipeline folder, here and on the Hub
stem, cls = "scheduling_flow_match_sde", "FlowMatchSDEScheduler"
loaded = get_class_from_dynamic_module(f"user/{stem}", f"{stem}.py", class_name=cls, **consent)
assert loaded.__module__.startswith("diffusers_modules")
assert loaded.from_pretrained(f"user/{stem}").config["last_t"] == 0.04
folder = work / "dit"
for file in (f"{stem}.py", "scheduler_config.json"):
    (folder / "scheduler" / file).write_bytes((resolve_folder(f"user/{stem}") / file).read_bytes())
index = read_json(folder / "model_index.json")
write_json(folder / "model_index.json", index | {"scheduler": [stem, cls]})
push_folder(folder, "user/dit")
for source in (folder, "user/dit"):
    try:
        DiffusionPipeline.from_pretrained(source)
        assert source == folder and not asks, "loaded without consent"
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    assert type(pipe.scheduler).__name__ == cls
    assert type(pipe.scheduler).__module__.startswith("diffusers_modules")
    pipe.set_progress_bar_config(disable=True)
    images = pipe([1], num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 32, 32, 3)
print(json.dumps(report))
"""

TROUBLE = """
(work / "no-card").mkdir()
(work / "no-card" / "config.json").write_text("{}")
(work / "bare-card").mkdir()
(work / "bare-card" / "config.json").write_text("{}")
(work / "bare-card" / "README.md").write_text("Hello.")
folders = [str(work / name) for name in ("no-card", "bare-card")]
report["some fail"] = command("--namespace", "user", "--only", "heads", "models", "--folder", *folders)
report["private"] = command("--namespace", "user", "--only", "pipelines", "--private")
report["not mine"] = command("--namespace", "other", "--only", "pipelines")
report["torch"] = "torch" in sys.modules
print(json.dumps(report))
"""

NO_TOKEN = """
tries = {"no token": ("user",), "bad": ("us/er",), "worse": ("a..b",), "dry": ("user", "--dry_run")}
for name, words in tries.items():
    try:
        report[name] = command("--namespace", *words, "--only", "pipelines")
    except (OSError, ValueError) as error:
        report[name] = f"{type(error).__name__}: {error}"
print(json.dumps(report))
"""

# What to load each published pipeline with; None: the class alone.
MODELS = {
    "feature_extraction": "ddim",
    "few_shot_segmentation": "ddim",
    "guided_dit": "dit",
    "guided_stable_diffusion": "sd",
    "guided_stable_diffusion_xl": "sdxl",
    "guided_unconditional": "ddim",
}
CLASSES = {
    "correspondence": "CorrespondencePipeline",
    "diffusion_autoencoder": "DiffusionAutoencoderPipeline",
    "diffusion_classifier": "DiffusionClassifierPipeline",
    "feature_extraction": "FeatureExtractionPipeline",
    "few_shot_segmentation": "FewShotSegmentationPipeline",
    "guided_dit": "GuidedDiTPipeline",
    "guided_stable_diffusion": "GuidedStableDiffusionPipeline",
    "guided_stable_diffusion_xl": "GuidedStableDiffusionXLPipeline",
    "guided_unconditional": "GuidedUnconditionalPipeline",
    "joint_diffusion": "JointDiffusionPipeline",
    "open_vocabulary_segmentation": "OpenVocabularySegmentationPipeline",
    "rcg": "RCGPipeline",
    "retrieval_diffusion": "RetrievalDiffusionPipeline",
    "sit": "SiTPipeline",
    "token_generation": "TokenGenerationPipeline",
}


def run_report(code, env):
    done = run_python(code, env, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not env.get("HF_TOKEN") or env["HF_TOKEN"] not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def commits(server):
    return {key: list(repo.titles.values()) for key, repo in server.store.repos.items()}


def test_all_again_and_back(tmp_path):
    pipeline().save_pretrained(tmp_path / "sit-model")
    (tmp_path / "sit-model" / "README.md").write_text("---\nlicense: mit\n---\nA SiT.")
    (tmp_path / "sit-model" / "checkpoint").mkdir()
    (tmp_path / "sit-model" / "checkpoint" / "optimizer.bin").write_bytes(b"x")
    shutil.copytree(saved("dit"), tmp_path / "dit")
    names = [file.parent.name for file in pipeline_files()]
    schedulers = [file.stem for file in scheduler_files()]
    with hub_server() as server:
        env = hub_env(server, tmp_path, WORK=tmp_path)
        report = run_report(PREPARE + ALL, env)
        assert report["first"]["out"].count("left out") == 1
        assert "    left out, not on the list of a pipeline: checkpoint/\n" in report["first"]["out"]
        kinds = [line.split() for line in report["first"]["out"].splitlines() if line[0] != " "]
        assert {line[2] for line in kinds[:-1]} >= {f"user/{name}" for name in [*names, *schedulers, "sit-model"]}
        assert {line[1] for line in kinds[:-1]} == {"pushed"}
        heads = [line[2] for line in kinds[:-1] if line[0] == "heads"]
        assert {"user/cars-edges", "user/cars-depth-standin"} <= set(heads)
        assert {tuple(titles[1:]) for titles in commits(server).values()} == {
            (f"Upload {kind} with diffusers-repr",) for kind in ("pipeline", "scheduler", "head", "model")
        } | {("Upload model with diffusers-repr",) * 2}  # the one that was changed
        again = [line.split()[1] for line in report["again"]["out"].splitlines()[:-1] if line[0] != " "]
        assert set(again) == {"unchanged"}
        assert f"{len(again)} repositories: {len(again)} unchanged" in report["again"]["out"]
        changed = [line.split()[1:3] for line in report["changed"]["out"].splitlines()[:-1] if line[0] != " "]
        assert [name for state, name in changed if state == "pushed"] == ["user/sit-model"]
        sent = server.store.repos["model", "user/sit-model"]
        assert "checkpoint/optimizer.bin" not in sent.commits[sent.branches["main"]]
        assert "heads" not in report["changed"]["out"].split("repositories")[0]
        assert all(run["code"] == 0 and run["err"] == "" for run in report.values())
        assert not any(repo.private for repo in server.store.repos.values())
        files = server.store.repos["model", "user/scheduling_flow_match_ode"]
        held = files.commits[files.branches["main"]]
        assert set(held) == {"README.md", "scheduler_config.json", "scheduling_flow_match_ode.py", ".gitattributes"}

        models = {name: MODELS.get(name) and str(saved(MODELS[name])) for name in names}
        models["sit"] = str(tmp_path / "sit-model")
        loaded = run_report(LOAD, env | {"MODELS": json.dumps(models)})
        assert loaded == {name: CLASSES[name] for name in names}
        asked = [path for _, path, _, _ in server.requests if path.startswith("/user/sit-model/resolve")]
        assert any(path.endswith("transformer/config.json") for path in asked)


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path):
    with hub_server() as server:
        report = run_report(PREPARE + TROUBLE, hub_env(server, tmp_path, WORK=tmp_path))
        some = report["some fail"]
        assert some["code"] == 1
        assert "has no README.md" in some["err"]
        assert "has no metadata" in some["err"]
        assert len(some["err"].splitlines()) == 2
        assert "2 failed" in some["out"].splitlines()[-1]
        assert ("model", "user/cars-edges") in server.store.repos
        assert ("model", "user/no-card") not in server.store.repos
        assert report["private"]["code"] == 0
        public = {name for (_, name), repo in server.store.repos.items() if not repo.private}
        private = {name for (_, name), repo in server.store.repos.items() if repo.private}
        assert private == {f"user/{file.parent.name}" for file in pipeline_files()}
        assert "user/cars-edges" in public
        assert report["not mine"]["code"] == 1
        assert "(403)" in report["not mine"]["err"]
        assert not report["torch"] or before("transformers", "5")  # which imports it by itself


def test_no_token_and_names_that_are_none(tmp_path):
    with hub_server() as server:
        report = run_report(PREPARE + NO_TOKEN, hub_env(server, tmp_path, token=None, WORK=tmp_path))
        assert server.requests == []
    assert report["no token"].startswith("HubError: Cannot publish to 'user': no Hub token was found.")
    assert "'us/er' is no namespace" in report["bad"]
    assert "'a..b' is no namespace" in report["worse"]
    assert "nothing was sent" in report["dry"]["out"]
    assert report["dry"]["code"] == 0


def test_two_of_one_name(tmp_path):
    items = [Publication("models", "a", tmp_path / "one"), Publication("heads", "a", tmp_path / "two")]
    with pytest.raises(ValueError, match=r"Two would go to user/a: .*one, .*two"):
        publish(items, "user", dry_run=True)


def test_class_of_a_folder(tmp_path):
    pipeline().save_pretrained(tmp_path)
    assert own_pipeline_class(tmp_path).__name__ == "SiTPipeline"
    assert own_pipeline_class(saved("ddim")) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import diffusers_repr", "line 1, imports 'diffusers_repr'"),
        ("from .path import x", "line 1, imports '.'"),
        ("import scipy.stats as s", "imports 'scipy.stats'"),
        ("x = (", "is not valid Python"),
        ("class A: ...", "has 0 classes"),
        ("class A(SchedulerMixin): ...\nclass B(SchedulerMixin): ...", "has 2 classes"),
    ],
)
def test_scheduler_files_stand_alone(tmp_path, text, told):
    file = tmp_path / "scheduling_mine.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=told):
        check_scheduler_file(file)
    with pytest.raises(FileNotFoundError, match="no scheduler file"):
        check_scheduler_file(tmp_path / "none.py")


def test_a_staged_scheduler(tmp_path):
    for file in scheduler_files():
        folder = stage_scheduler(file, tmp_path / file.stem, f"user/{file.stem}")
        assert (folder / file.name).read_bytes() == file.read_bytes()
        config = json.loads((folder / "scheduler_config.json").read_text())
        assert config["_class_name"] == check_scheduler_file(file)
        card = (folder / "README.md").read_text()
        assert f'"user/{file.stem}", "{file.name}", class_name="{config["_class_name"]}"' in card
        assert "\n\n\n" not in card
        shutil.rmtree(folder)
