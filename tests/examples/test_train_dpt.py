"""`train_dpt.py`: three stages end to end, gone on with, and what cannot be."""

import json

import pytest
import torch
import train_dpt
import yaml
from diffusers_repr.pipelines.guided_unconditional import GuidedUnconditionalPipeline

from diffusers_repr.assign import ClassifierAssigner
from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.store.assignment_store import AssignmentStore
from diffusers_repr.store.image_store import ImageStore
from diffusers_repr.store.vector_store import VectorTable
from tests.examples.scripts import EXAMPLES, run_script

RECIPE = EXAMPLES / "configs" / "dpt_digits.yaml"
SMALL = {"block_out_channels": [8, 16], "norm_num_groups": 4, "attention_head_dim": 8}


def run(folder, **flags):
    recipe = yaml.safe_load(RECIPE.read_text())
    given = {
        "output_dir": str(folder / "out"), "model": json.dumps(recipe["model"] | SMALL), "max_train_steps": 2,
        "train_batch_size": 8, "images_per_class": 3, "sample_steps": 2, "eval_batch_size": 0, "logging_steps": 1,
        "labels_per_class": 2, **flags,
    }  # fmt: skip
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    run_script(train_dpt.main, "train_dpt", "--config", str(RECIPE), *words)
    return folder / "out"


def test_three_stages(tmp_path, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    out = run(tmp_path)
    told, assigned = json.loads((out / "dpt.json").read_text()), tmp_path / "out-assigned"
    assert (told["labels"], told["generated"], told["eval_images"]) == (20, 30, 500)
    splits = load_digits_splits()
    truth = {name: torch.tensor(splits[name]["label"]) for name in ("train", "test")}
    ids = torch.from_numpy(AssignmentStore.open(assigned / "assignments").array("class_id"))
    assert told["pseudo_label_accuracy"] == float((ids == truth["train"]).double().mean())
    assert 0.4 < told["pseudo_label_accuracy"] < 1
    keys = ImageStore.open(out / "generated").image_keys()
    assert torch.bincount(torch.tensor([int(key.condition) for key in keys])).tolist() == [3] * 10
    assert json.loads(keys[0].guidance)["guidance_scale"] == 1.4
    assert json.loads(keys[0].guidance)["scheduler"] == "DPMSolverMultistepScheduler"
    held = VectorTable.open(out / "test-vectors")[torch.arange(500)].float()
    for name, folder in (("first", assigned / "assigner"), ("last", out / "classifier")):
        found = ClassifierAssigner.from_pretrained(folder).assign(held)
        assert told[f"accuracy_{name}"] == float((found == truth["test"]).double().mean())
    assert told["accuracy_first"] != told["accuracy_last"]
    pipe = GuidedUnconditionalPipeline.from_pretrained(out)
    assert pipe.unet.config.num_class_embeds == 11
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    before |= {path: path.stat().st_mtime_ns for path in (out / "classifier").iterdir()}
    assert len(before) > 3
    run(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert json.loads((out / "dpt.json").read_text()) == told


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"assigner": "kmeans"}, "takes `assigner: classifier`, an `encoder`"),
        ({"labels_per_class": 0}, "labels_per_class"),
        ({"labels_per_class": 200}, "labels a class, but"),
        ({"eval_split": "train"}, "is trained on; measure on another"),
        ({"label_column": "none"}, "leaves no label to learn from"),
        ({"images_per_class": 0}, "`images_per_class` must be at least 1"),
    ],
)
def test_what_cannot_be(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(EXAMPLES.parent)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **flags)
    assert not (tmp_path / "out").exists()
