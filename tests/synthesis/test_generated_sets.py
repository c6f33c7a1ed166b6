"""`diffusers-repr generate`, stopped, killed, on two processes, on a full disk, damaged; and what is published."""

import errno
import json
import os
import shutil
import time
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset, Features, Image, Value
from huggingface_hub import DatasetCard

from diffusers_repr.cli import main
from diffusers_repr.data.image_data import load_images
from diffusers_repr.store import write
from diffusers_repr.store.image_store import ImageStore
from diffusers_repr.synthesis import ClassMaker, GenerationRecipe, recipe, sources
from tests.training.loop_cases import in_a_fork

RECIPE = {"model": "examples/models/digits-class-ddim", "method": "class", "count": 4, "classes": ["1", "7"],
          "num_inference_steps": 2, "guidance_scale": [1, 5], "scheduler": "DDPMScheduler"}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def words(folder, name="out", **changes) -> list[str]:
    """The command, of a recipe that is written beside its store."""
    folder.mkdir(exist_ok=True)
    recipe = folder / f"recipe-{os.getpid()}.yaml"  # of two processes each writes its own
    recipe.write_text(yaml.safe_dump({k: v for k, v in (RECIPE | changes).items() if v is not None}))
    sizes = ["--batch_size", "2", "--shard_size", "2"]
    return ["generate", str(recipe), "--out", str(folder / name), "--quiet", "--device", "cpu", *sizes]


def job(folder):
    """In each of two processes."""
    return main(words(folder))


def shards(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "data").glob("*.parquet"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A set that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(words(folder)) == 0
    assert len(shards(folder / "out")) == 4
    return folder / "out"


def test_two_processes_make_the_same_files(whole, together):
    folder, told = together
    assert told["generate"] == [0, 0]
    assert shards(folder / "generate" / "out") == shards(whole)


def test_killed_in_the_middle_and_run_again(whole, tmp_path, monkeypatch):
    made = ClassMaker.make

    def slow(self, keys):
        if (tmp_path / "out/data/train-00001-of-00004.parquet").exists():  # amid the third file
            (tmp_path / "waiting").touch()
            time.sleep(60)
        return made(self, keys)

    def until():
        while not (tmp_path / "waiting").exists():
            time.sleep(0.05)

    with monkeypatch.context() as patch:
        patch.setattr(ClassMaker, "make", slow)
        assert in_a_fork(lambda: main(words(tmp_path)), until) == -9
    assert list(shards(tmp_path / "out")) == [f"train-0000{n}-of-00004.parquet" for n in (0, 1)]
    asked = []
    monkeypatch.setattr(ClassMaker, "make", lambda self, keys: asked.extend(keys) or made(self, keys))
    assert main(words(tmp_path)) == 0
    assert len(asked) == 4  # those of the two files that were there are not made again
    assert shards(tmp_path / "out") == shards(whole)
    assert (tmp_path / "out/README.md").read_text() == (whole / "README.md").read_text()


def test_a_full_disk_and_a_damaged_file(whole, tmp_path, monkeypatch, capsys):
    kept = write.write_shard

    def full(folder, layout, shard):
        if shard == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return kept(folder, layout, shard)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_shard", full)
        assert main(words(tmp_path)) != 0
    told = " ".join(capsys.readouterr().err.split())
    assert "The disk is full" in told
    assert "2 of 4 shards" in told
    assert main(words(tmp_path)) == 0
    assert shards(tmp_path / "out") == shards(whole)
    damaged = tmp_path / "out/data/train-00001-of-00004.parquet"
    data, group = bytearray(damaged.read_bytes()), pq.read_metadata(damaged).row_group(0)
    chunks = [group.column(number) for number in range(group.num_columns)]
    pictures = next(chunk for chunk in chunks if chunk.path_in_schema == "image.bytes")
    data[pictures.data_page_offset + pictures.total_compressed_size - 8] ^= 0xFF
    damaged.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"train-00001-of-00004\.parquet"):
        load_images(str(tmp_path / "out"), "train")  # as every script opens it
    assert main(words(tmp_path)) == 0  # the damaged file alone is made anew
    assert shards(tmp_path / "out") == shards(whole)


def test_a_whole_set_is_known_without_its_model(whole, tmp_path, monkeypatch, capsys):
    def opened(*given):
        raise ValueError("a model is loaded")

    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(recipe, "open_maker", opened)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert main(words(tmp_path)) == 0
    assert "8 images are in" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    for changes in ({"seed": 1}, {"count": 3}, {"guidance": {"PAG": 1.0}}):
        assert main(words(tmp_path, **changes)) != 0
        assert "a model is loaded" in capsys.readouterr().err
    (tmp_path / "out/data/train-00001-of-00004.parquet").write_bytes(b"damaged")
    assert main(words(tmp_path)) != 0
    assert "a model is loaded" in capsys.readouterr().err


def test_sources_are_files_or_commits(tmp_path, monkeypatch):
    shutil.copytree(RECIPE["model"], tmp_path / "model")
    asked = {"method": "class", "count": 1}

    def told(model=tmp_path / "model", **changes):
        return sources.sources_hash(GenerationRecipe(str(model), **asked, **changes))

    first = told()
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere" / "model")
    (tmp_path / "model" / "loss.jsonl").write_text("a log decides nothing")
    assert told() == told(tmp_path / "elsewhere" / "model") == first
    (weights,) = (tmp_path / "model").rglob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert told() != first
    weak = {"scale": 1.0, "weaker_model": str(tmp_path / "elsewhere" / "model")}
    guided = told(guidance={"AutoGuidance": weak})
    assert guided != told(guidance={"AutoGuidance": {**weak, "scale": 2.0}})
    shutil.copyfile(weights, tmp_path / "elsewhere" / "model" / weights.relative_to(tmp_path / "model"))
    assert told(guidance={"AutoGuidance": weak}) != guided
    commits = {None: "a" * 40, "v1": "b" * 40}
    calls = []

    def info(self, repo_id, revision=None, **given):
        calls.append(revision)
        if repo_id == "user/gone":
            raise OSError("not reached")
        return SimpleNamespace(sha=commits[revision])

    monkeypatch.setattr(sources.HfApi, "repo_info", info)
    main_branch, tagged = told("user/model"), told("user/model", revision="v1")
    assert main_branch != tagged
    commits[None] = "c" * 40
    assert told("user/model") != main_branch
    calls.clear()
    assert told("user/model", revision="b" * 40)
    assert not calls  # a commit never moves
    assert told("user/gone") is None
    assert told(tmp_path / "nowhere") is None


def test_an_unreadable_source_is_named_before_anything_is_made(tmp_path, capsys):
    rows = {"image": [{"bytes": b"no picture", "path": None}], "label": [0]}
    Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")})).to_parquet(
        tmp_path / "images.parquet"
    )
    changes = {"model": "examples/models/digits-ddpm", "method": "image_to_image", "classes": None,
               "guidance_scale": None, "dataset_name": str(tmp_path / "images.parquet"),
               "scheduler": "DDIMScheduler"}  # fmt: skip
    assert main(words(tmp_path, **changes)) != 0
    assert "row 0" in capsys.readouterr().err.lower()
    assert not (tmp_path / "out" / "data").exists()


def test_what_is_published(whole, tmp_path, capsys):
    card = DatasetCard((whole / "README.md").read_text())
    assert {"synthetic", "diffusers-repr"} <= set(card.data.tags)
    assert "8 images of `" in card.text
    recipe = yaml.safe_load(card.text.split("```yaml")[1].split("```")[0])
    assert (recipe["count"], recipe["guidance_scale"]) == (4, [1, 5])
    assert str(tmp_path.parent) not in card.content
    (whole / "notes.txt").write_text("mine")
    assert main(["push", str(whole), "user/digits", "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("README.md", "manifest.json", *shards(whole)))
    (whole / "notes.txt").unlink()
    assert json.loads((whole / "manifest.json").read_text())["complete"]
    assert ImageStore.open(whole).verify() is None
