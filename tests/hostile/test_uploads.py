"""What must not leave this machine: files beside an artefact, targets of links, places on the disk."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from PIL import Image
from safetensors.numpy import save_file

from diffusers_repr.cli import main
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub import push_folder
from diffusers_repr.hub.allowed import KINDS
from diffusers_repr.hub.upload import plan_upload
from diffusers_repr.store.card import store_card
from diffusers_repr.tasks import Probe
from tests.tasks.planted import images, pipeline
from tests.testers.hosts import close_session
from tests.testers.hub_server import hub_server

SECRET = "s3cr3t-0f-a-user"
DECOYS = (
    ".env", ".netrc", "token", "id_rsa", "key.pem", "notes.txt", "README.md.bak", "config.json~", "pytorch_model.bin",
    "head.pt", "state.pkl", "secrets.json", "private.png", ".hidden/config.json", "other/config.json", "weights.npz",
    "unet/.env", "unet/diffusion_pytorch_model.bin", "unet/notes.json", "data/private.csv", "heads/one/optimizer.bin",
    "heads/token", "diffusion_pytorch_model\n.safetensors", "credentials.safetensors", "wandb/run.json",
)  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"
CARD = "---\nlicense: mit\n---\n![shown](images/shown.png) ![out](../private.png) ![hidden](.env.png)\n"
INDEX = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["scheduling_mine", "Mine"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "vae": [None, None],
    "../other": ["diffusers", "UNet2DModel"],
}
TRUE = {  # of each kind, what is sent
    "probe": ["README.md", "images/shown.png", "probe.json", "config.json", WEIGHTS],
    "segmenter": ["README.md", "images/shown.png", "segmentation.json", "config.json", WEIGHTS],
    "matcher": ["README.md", "images/shown.png", "correspondence.json"],
    "open-vocabulary segmenter": [
        "README.md", "images/shown.png", "panoptic.json", "config.json", WEIGHTS, "evaluation.jsonl",
    ],
    "zero-shot classifier": ["README.md", "images/shown.png", "zero_shot.json"],
    "representation probe": [
        "README.md", "images/shown.png", "representation.json", "head/config.json", f"head/{WEIGHTS}",
    ],
    "store of features": ["README.md", "images/shown.png", "manifest.json", "data/train-00000-of-00001.parquet"],
    "store of images": ["README.md", "images/shown.png", "manifest.json", "data/train-00000-of-00001.parquet"],
    "store of assignments": ["README.md", "images/shown.png", "manifest.json", "data/train-00000-of-00001.parquet"],
    "cache of latents": ["README.md", "images/shown.png", "manifest.json", "data/moments-00000-of-00001.safetensors"],
    "pipeline": [
        "README.md", "images/shown.png", "model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "samples.png",
        "scheduler/scheduler_config.json", "scheduler/scheduling_mine.py", "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ],
    "training result": [
        "README.md", "images/shown.png", "model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "recipe.yaml",
        "heads/one/config.json", f"heads/one/{WEIGHTS}", "loss.jsonl", "evaluation.jsonl", "samples.png",
    ],
    "custom pipeline": ["README.md", "images/shown.png", "pipeline.py", "__init__.py", "LICENSE"],
    "scheduler": ["README.md", "images/shown.png", "scheduler_config.json", "scheduling_mine.py"],
    "encoder": ["README.md", "images/shown.png", "config.json", "model.safetensors", "preprocessor_config.json"],
    "head": ["README.md", "images/shown.png", "config.json", WEIGHTS, "weak/config.json", f"weak/{WEIGHTS}"],
    "model": ["README.md", "images/shown.png", "config.json", WEIGHTS, "evaluation.json", "loss.jsonl"],
}  # fmt: skip
TOLD = {  # what makes a kind known by its JSON
    "cache of latents": {"layout": {"kind": "features"}},
    "store of images": {"layout": {"kind": "images"}},
    "store of assignments": {"layout": {"kind": "assignments"}},
    "encoder": {"model_type": "vit"},
}


def write(path, kind="model"):
    """A file of the right form for its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name == "README.md":
        path.write_text(CARD)
    elif path.suffix == ".safetensors":
        save_file({"w": np.ones(3, np.float32)}, path)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"x": [1]}), path)
    elif path.suffix == ".png":
        Image.new("L", (2, 2)).save(path)
    elif path.name == "model_index.json":
        path.write_text(json.dumps(INDEX))
    elif path.suffix == ".json":
        path.write_text(json.dumps(TOLD.get(kind, {})))
    else:
        path.write_text("{}\n" if path.suffix == ".jsonl" else "seed: 7\n" if path.suffix == ".yaml" else "")


def artefact(folder, kind, decoys=DECOYS):
    """A whole artefact with what must stay here lying in it."""
    for name in TRUE[kind]:
        write(folder / name, kind)
    for name in decoys:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_list_is_sent(tmp_path, kind):
    upload = plan_upload(artefact(tmp_path, kind), None if kind not in ("head",) else kind)
    assert upload.kind == kind
    assert [file.path for file in upload.files] == sorted(TRUE[kind])
    line = upload.left_out_line()
    assert "\n" not in line
    assert line.startswith(f"left out, not on the list of a {kind}: ")
    assert {".env", ".netrc", "key.pem", "head.pt"} <= set(upload.left_out)
    staged = upload.stage(tmp_path.parent / f"{tmp_path.name}-staged")
    names = {file.relative_to(staged).as_posix() for file in staged.rglob("*") if file.is_file()}
    assert names == set(TRUE[kind])


def link_file_out(folder, outside):
    (outside / "secret.json").write_text(json.dumps({"key": SECRET}))
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(outside / "secret.json")


def link_relative_out(folder, outside):
    (outside / "secret.json").write_text(json.dumps({"key": SECRET}))
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(Path("..") / outside.name / "secret.json")


def link_through_a_link(folder, outside):
    (outside / "x.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / "way").symlink_to(outside / "x.safetensors")
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("way")


def link_to_a_decoy(folder, outside):
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(".env")


def link_a_folder(folder, outside):
    shutil.move(folder / "weak", outside / "weak")
    (folder / "weak").symlink_to(outside / "weak", target_is_directory=True)


def link_a_folder_inside(folder, outside):
    shutil.move(folder / "weak", folder / ".weak")
    (folder / "weak").symlink_to(".weak", target_is_directory=True)


def dead_link(folder, outside):
    (folder / "LICENSE").symlink_to(outside / "none")


def fifo(folder, outside):
    os.mkfifo(folder / "LICENSE")


def pickled(folder, outside):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"w": 1}))


def key_as_config(folder, outside):
    (folder / "config.json").write_text("-----BEGIN PRIVATE KEY-----\n")


def text_as_picture(folder, outside):
    (folder / "images" / "shown.png").write_text(SECRET)


CASES = {
    link_file_out: "link to a place outside",
    link_relative_out: "link to a place outside",
    link_through_a_link: "link to a place outside",
    link_to_a_decoy: "link to '.env', which is not uploaded",
    link_a_folder: "link to a place outside",
    link_a_folder_inside: "link to '.weak', which is not uploaded",
    dead_link: "link to a place outside",
    fifo: "no plain file",
    pickled: "is no safetensors file",
    key_as_config: "is not valid JSON",
    text_as_picture: "is no png file",
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda case: case.__name__)
def test_links_and_false_names_are_refused(tmp_path, spoil):
    folder, outside = artefact(tmp_path / "head", "head"), tmp_path / "outside"
    outside.mkdir()
    spoil(folder, outside)
    with pytest.raises(ValueError, match=CASES[spoil]) as refused:
        plan_upload(folder, "head")
    assert SECRET not in str(refused.value)


def test_a_link_within_the_list_is_a_file(tmp_path):
    folder = artefact(tmp_path, "model")
    (folder / "model.safetensors").symlink_to(WEIGHTS)
    assert "model.safetensors" in [file.path for file in plan_upload(folder).files]


@pytest.mark.parametrize("name", ["x.bin", ".env", "a/.env", ".ssh/id", "*/x.json", "../x.json", "a/", "x.pkl"])
def test_what_can_never_be_included(tmp_path, name):
    with pytest.raises(ValueError, match="is never uploaded"):
        plan_upload(artefact(tmp_path, "model"), include=[name])


def test_further_files_by_name(tmp_path):
    folder = artefact(tmp_path, "model")
    assert "notes.txt" in [file.path for file in plan_upload(folder, include="notes.txt").files]
    with pytest.warns(UserWarning, match=r"Not all of .* is pushed; left out, not on the list of a model: "):
        assert push_folder(folder, "user/x", dry_run=True) == ""
    with pytest.raises(ValueError, match="Cannot tell what"):
        plan_upload(folder / "data")
    with pytest.raises(ValueError, match="kind='other'; allowed are"):
        plan_upload(folder, "other")


def text_of(upload, name):
    (file,) = (file for file in upload.files if file.path == name)
    return file.text if file.text is not None else file.source.read_text()


def test_places_of_this_machine_become_last_names(tmp_path):
    folder, place = artefact(tmp_path / "store", "store of features", ()), tmp_path / "my" / "pictures"
    place.mkdir(parents=True)
    manifest = {"recipe": {"model": {"name": "/gone/models/sd"}, "data": {"name": str(place)}, "prompt": "/imagine x"}}
    manifest |= {"label": {"names": ["/m/012", "..", "~"]}, "note": str(place), "recipe_hash": "abc"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "README.md").write_text(f"Of `{place}`, by `/gone/models/sd`; see /usr/share.\n")
    upload = plan_upload(folder)
    sent = json.loads(text_of(upload, "manifest.json"))
    assert sent["recipe"] == {"model": {"name": "sd"}, "data": {"name": "pictures"}, "prompt": "/imagine x"}
    assert sent["label"]["names"] == ["/m/012", "..", "~"]
    assert sent["note"] == "pictures"
    assert text_of(upload, "README.md") == "Of `pictures`, by `sd`; see /usr/share.\n"
    assert json.loads((folder / "manifest.json").read_text()) == manifest  # here all stays

    result = artefact(tmp_path / "run", "training result", ())
    (result / "recipe.yaml").write_text(f"dataset_name: {place}\nencoder: [org/name, ~/teacher, ../other/teacher]\n")
    (result / "unet" / "config.json").write_text(json.dumps({"_name_or_path": "/gone/a", "labels": {"0": "/m/012"}}))
    upload = plan_upload(result)
    assert text_of(upload, "recipe.yaml") == "dataset_name: pictures\nencoder:\n- org/name\n- teacher\n- teacher\n"
    assert json.loads(text_of(upload, "unet/config.json")) == {"_name_or_path": "a", "labels": {"0": "/m/012"}}


def test_a_recipe_that_grows_is_not_sent(tmp_path):
    """By the one reader of YAML: a few lines of aliases stand for billions of values."""
    result = artefact(tmp_path / "run", "training result", ())
    (result / "recipe.yaml").write_text("a: &a [x, x]\nb: [*a, *a]\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml, line 2: the alias \*a is not followed"):
        plan_upload(result)


def test_the_card_of_a_store_tells_no_place():
    features = {"noise": "clean", "ensemble_size": 1, "seed": 0, "pooling": None, "where": "output", "prompt": None}
    features |= {"image_size": [8, 8], "dtype": "float32"}
    model = {"name": "/gone/models/sd", "revision": None, "class": "X"}
    data = {"name": "/gone/cats", "split": "train", "rows": 1}
    recipe = {"model": model, "data": data, "features": features}
    card = store_card({"recipe": recipe, "columns": [], "rows": 1, "recipe_hash": "a", "label": None})
    assert "/gone" not in card
    assert "- model: `sd`\n- data: `cats`, split" in card


def test_a_text_that_tells_the_home_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("README.md", "LICENSE", "loss.jsonl", "config.json"):
        folder = artefact(tmp_path / name, "model", ())
        text = '{"x": "/home/me/data"}' if "json" in name else f"# A\n\nTrained in {folder}/x on /home/me/data."
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=rf"{name}, line \d, tells where something lies on this machine"):
            plan_upload(folder)
    folder = artefact(tmp_path / "fine", "model", ())
    (folder / "README.md").write_text("/home/meadow and ~/x and /home/other")
    plan_upload(folder)


def test_dry_run_lists_files_and_sizes(tmp_path, capsys, monkeypatch):
    folder = artefact(tmp_path / "model", "model")
    save_file({"w": np.ones(1000, np.float32)}, folder / WEIGHTS)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["push", str(folder), "user/x", "--dry_run"]) == 0
    out = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "2 B  config.json" in out
    assert f"4.0 KiB  {WEIGHTS}" in out
    assert [line for line in out if line.startswith("6 files, ")]
    assert out[-2].startswith("left out, not on the list of a model: ")
    assert out[-1] == "Nothing was sent."
    monkeypatch.setattr("diffusers_repr.cli.publish._examples", lambda: None)
    assert main(["publish", "--namespace", "user", "--only", "models", "--folder", str(folder), "--dry_run"]) == 0
    out = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"4.0 KiB  {WEIGHTS}" in out
    assert any(line.startswith("left out") for line in out)


@pytest.mark.filterwarnings("ignore:Use 'content")
def test_a_push_over_http(tmp_path, monkeypatch, capsys):
    folder = artefact(tmp_path / "result", "training result")
    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        close_session()
        try:
            assert main(["push", str(folder), "user/result"]) == 0
        finally:
            close_session()
        repo = server.store.repos["model", "user/result"]
        sent = repo.commits[repo.branches["main"]]
        assert set(sent) == {*TRUE["training result"], ".gitattributes"}
        everything = [file.data or b"" for commit in repo.commits.values() for file in commit.values()]
        assert not any(SECRET.encode() in data for data in [*everything, *server.store.large_files.values()])
    out = capsys.readouterr().out
    assert "left out, not on the list of a training result: .env" in out
    assert server.token not in out


def test_a_probe_tells_the_way_to_its_base_here_and_only_its_name_to_others(tmp_path, monkeypatch):
    base = tmp_path / "models" / "base"
    pipeline().save_pretrained(base)
    probe = Probe.fit(Denoiser.from_pretrained(base), images(12), layers=["mid_block"], timestep=50, protocol="ridge")
    assert probe.recipe.base.name == str(base)
    probe.save_pretrained(tmp_path / "out" / "probe")
    saved = json.loads((tmp_path / "out" / "probe" / "probe.json").read_text())
    assert saved["base"]["name"] == "../../models/base"
    texts = [file.read_text() for file in (tmp_path / "out" / "probe").iterdir() if file.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in text for text in texts)

    elsewhere = tmp_path / "elsewhere"  # another folder to work from, and one with a wrong model of that way
    (elsewhere / "a" / "b").mkdir(parents=True)
    pipeline(seed=1).save_pretrained(elsewhere / "models" / "base")
    monkeypatch.chdir(elsewhere / "a" / "b")
    x = images(3, seed=4)[0]
    loaded = Probe.from_pretrained(tmp_path / "out" / "probe")
    assert (loaded(x).probabilities == probe(x).probabilities).all()
    assert loaded.recipe.base == probe.recipe.base
    loaded.save_pretrained(tmp_path / "again")  # from another depth
    assert json.loads((tmp_path / "again" / "probe.json").read_text())["base"]["name"] == "../models/base"
    Probe.from_pretrained(tmp_path / "again")

    for pushed in (tmp_path / "again", tmp_path / "out" / "probe"):
        assert json.loads(text_of(plan_upload(pushed), "probe.json"))["base"]["name"] == "base"
    sent = {}

    def stage(upload, target):
        sent.update({file.path: text_of(upload, file.path) for file in upload.files if not file.path.endswith("ors")})
        raise InterruptedError

    monkeypatch.setattr("diffusers_repr.hub.upload.Upload.stage", stage)
    with pytest.warns(UserWarning, match="not on the Hub"), pytest.raises(InterruptedError):
        loaded.push_to_hub("user/probe", token="hf_x")
    assert json.loads(sent["probe.json"])["base"]["name"] == "base"
    assert not any(str(tmp_path) in text for text in sent.values())
