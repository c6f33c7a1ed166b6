"""From scribbles to a segmenter by three commands, at toy size; what they leave loads by the stock classes."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
import train_controlnet
import train_scribble
import yaml
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from make_scenes import main as make_scenes
from transformers import AutoModelForSemanticSegmentation

from diffusers_repr.cli import main
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig, load_images
from diffusers_repr.data.mixing import MixingConfig
from diffusers_repr.data.scribbles import MASK_NAMES
from diffusers_repr.hub.allowed import kind_of
from diffusers_repr.metrics import mean_iou
from diffusers_repr.objectives import ControlNetConfig, ScribbleConfig, SegmenterConfig
from diffusers_repr.synthesis import load_controlnet, open_maker, read_generation
from diffusers_repr.training import TrainingConfig
from tests.examples.scripts import run_script
from tests.objectives.test_scribble import NETWORK
from tests.testers.hub_server import hub_env, hub_server, run_python
from tests.testers.models import saved

RUN = {"train_batch_size": 3, "max_train_steps": 2, "checkpointing_steps": 2, "logging_steps": 1, "cache_images": True,
       "image_column": "image", "mask_column": "scribble", "label_column": "none", "resolution": 32,
       "mask_names": list(MASK_NAMES), "eval_split": "test"}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scribbles")
    counts = {"train": 4, "validation": 0, "test": 3, "held_out": 0}
    flags = [part for split, count in counts.items() for part in (f"--{split}", str(count))]
    make_scenes(["--scribbles", "--out", str(folder / "scenes"), *flags])
    return folder


def flags(folder, name, **changes):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**RUN, "dataset_name": str(folder / "scenes"), **changes}))
    return ["--config", str(path), "--output_dir", str(folder / name)]


@pytest.fixture(scope="module")
def controlnet(places):
    base = {"pretrained_model_name_or_path": str(saved("short_sd")), "caption_column": "caption", "eval_images": 3}
    run_script(train_controlnet.main, "train_controlnet", *flags(places, "controlnet", **base))
    return places / "controlnet"


@pytest.fixture(scope="module")
def variants(places, controlnet):
    """Two sets, of two strengths."""
    found = []
    for strength in (0.5, 1.0):
        recipe = {
            "model": str(saved("short_sd")), "method": "hint", "count": 1, "dataset_name": str(places / "scenes"),
            "image_column": "image", "mask_column": "scribble", "strength": strength,
            "controlnet": str(controlnet), "guidance_scale": [1, 4], "num_inference_steps": 2,
            "prompt": "a photo of {classes}", "scheduler": "DDIMScheduler",
        }  # fmt: skip
        (places / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        out = str(places / f"variants-{strength}")
        with warnings.catch_warnings():  # the ControlNet has hardly left its zeros, if at all
            warnings.simplefilter("ignore")
            assert main(["generate", str(places / "recipe.yaml"), "--out", out, "--quiet"]) == 0
        assert str(places) not in (places / f"variants-{strength}/manifest.json").read_text()
        found.append(out)
    return found


def test_a_controlnet(controlnet):
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        saved("short_sd"), controlnet=ControlNetModel.from_pretrained(controlnet), safety_checker=None
    )
    pipe.set_progress_bar_config(disable=True)
    hints = load_controlnet(controlnet)[1]
    mask = torch.full((1, 32, 32), 255)
    with torch.no_grad():
        image = pipe("a six", hints(mask), num_inference_steps=1, guidance_scale=1.0, output_type="np").images
    assert image.shape[1:] == (32, 32, 3)
    assert hints.config["class_names"] == list(MASK_NAMES)
    measured = json.loads((controlnet / "evaluation.jsonl").read_text())
    assert {f"eval_{name}" for name in ("hint", "other_hint", "null_hint", "no_hint")} < measured.keys()
    assert measured["eval_hint"] == pytest.approx(measured["eval_no_hint"], rel=0.1)  # two steps from the base
    assert kind_of(controlnet) == "training result"


def test_a_segmenter_of_real_and_made_images(places, variants):
    mixed = {"segmenter": NETWORK, "mixing": "curriculum", "synthetic_dirs": variants, "replace_probability": 1.0,
             "curriculum_epochs": 2}  # fmt: skip
    run_script(train_scribble.main, "train_scribble", *flags(places, "segmenter", **mixed))
    out = places / "segmenter"
    network = AutoModelForSemanticSegmentation.from_pretrained(out).eval()
    told = json.loads((out / "preprocessor_config.json").read_text())
    assert told["image_mean"] == told["image_std"] == [0.5] * 3
    data = load_images(str(places / "scenes"), "test", "image", mask_column="mask", mask_names=MASK_NAMES)
    images = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in data.read(range(3))])
    with torch.no_grad():
        logits = network(pixel_values=images / 127.5 - 1).logits
    found = logits.argmax(1)
    truth = torch.stack([torch.from_numpy(sample.mask) for sample in data.samples(range(3))])
    measured = json.loads((out / "evaluation.jsonl").read_text())
    assert measured["eval_mean_iou"] == pytest.approx(mean_iou(found, truth, 16), abs=1e-6)
    assert network.config.id2label[1] == "zero"
    assert kind_of(out) == "training result"


def test_a_run_that_is_stopped_goes_on_in_the_same_epoch(places, variants):
    mixed = {"segmenter": NETWORK, "mixing": "curriculum", "synthetic_dirs": variants, "replace_probability": 1.0,
             "curriculum_epochs": 2, "eval_split": "none", "max_train_steps": 4, "checkpointing_steps": 2}  # fmt: skip
    logs = []
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            given = flags(places, name, **{**mixed, "max_train_steps": stop})
            run_script(train_scribble.main, "train_scribble", *given)
        lines = [json.loads(line) for line in (places / name / "loss.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines])
    assert logs[0] == logs[1]


CLIENT = """
import json, os, sys
from pathlib import Path
import yaml
sys.path.insert(0, "examples")
import train_controlnet, train_scribble
from diffusers_repr import hub
from diffusers_repr.cli import main
from diffusers_repr.store.image_store import ImageStore
from diffusers_repr.synthesis import recipe as recipes
from tests.examples.scripts import run_script

work, report = Path(os.environ["WORK"]), {}
commit = hub.push_folder(work / "controlnet", "user/controlnet").rsplit("/", 1)[1]
hub.push_folder(work / "segmenter", "user/segmenter")
hub.push_folder(work / "base", "user/base")
shared = yaml.safe_load((work / "shared.yaml").read_text())

def train(script, name, **changes):
    (work / f"{name}.yaml").write_text(yaml.safe_dump(shared | changes))
    flags = ["--config", str(work / f"{name}.yaml"), "--output_dir", str(work / name)]
    return run_script(script.main, script.__name__, *flags)

def generate(name, **changes):
    recipe = {"model": "user/base", "method": "hint", "controlnet": "user/controlnet", "count": 1, "limit": 1,
              "dataset_name": shared["dataset_name"], "image_column": "image", "mask_column": "scribble",
              "num_inference_steps": 2, "strength": 0.5, "scheduler": "DDIMScheduler"}
    (work / "hub.yaml").write_text(yaml.safe_dump(recipe | changes))
    return main(["generate", str(work / "hub.yaml"), "--out", str(work / name), "--quiet", "--device", "cpu"])

def told(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was refused")

base = {"pretrained_model_name_or_path": "user/base", "caption_column": "caption", "eval_images": 3}
train(train_controlnet, "controlnet-on", **base, controlnet_name_or_path="user/controlnet", controlnet_revision=commit)
train(train_scribble, "segmenter-on", segmenter_name_or_path="user/segmenter")
assert generate("made") == 0 and len(ImageStore.open(work / "made")) == 1
report["recipe"] = ImageStore.open(work / "made").manifest["about"]["recipe"]["controlnet"]
opened, recipes.open_maker = recipes.open_maker, None
assert generate("made") == 0  # no model is loaded for what is there
recipes.open_maker = opened
hub.push_folder(work / "controlnet-on", "user/controlnet")
assert generate("made") != 0  # the branch has moved, and with it what the images are of
assert generate("again", controlnet_revision=commit) == 0
report["kind"] = told(train, train_controlnet, "bad", **base, controlnet_name_or_path="user/segmenter")
report["none"] = told(train, train_controlnet, "bad", **base, controlnet_name_or_path="user/nothing")
report["revision"] = told(train, train_controlnet, "bad", **base, controlnet_name_or_path="user/controlnet",
                          controlnet_revision="nowhere")
report["segmenter"] = told(train, train_scribble, "bad", segmenter_name_or_path="user/controlnet")
assert not (work / "bad").exists()
print(json.dumps(report))
"""


@pytest.mark.slow
def test_by_hub_id(places, controlnet, tmp_path):
    shutil.copytree(controlnet, tmp_path / "controlnet")
    shutil.copytree(saved("short_sd"), tmp_path / "base")
    network = SegmenterConfig(NETWORK).build(MASK_NAMES).network
    network.save_pretrained(tmp_path / "segmenter")
    (tmp_path / "segmenter" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3}))
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump({**RUN, "dataset_name": str(places / "scenes")}))
    with hub_server() as server:
        env = hub_env(server, tmp_path / "cache") | {"WORK": str(tmp_path), "OMP_NUM_THREADS": "1"}
        run = run_python(CLIENT, env, timeout=600)  # three trainings
    assert run.returncode == 0, run.stderr[-3000:]
    report = json.loads(run.stdout.splitlines()[-1])
    assert report["recipe"] == "user/controlnet"
    assert "no ControlNetModel" in report["kind"]
    assert "user/nothing" in report["none"]
    assert "nowhere" in report["revision"]
    assert "no network of transformers that segments" in report["segmenter"]
    assert kind_of(tmp_path / "controlnet-on") == kind_of(tmp_path / "segmenter-on") == "training result"


def test_what_the_scripts_refuse(places, controlnet):
    base = {"pretrained_model_name_or_path": str(saved("short_sd"))}
    for script, changes, message in (
        (train_controlnet, {**base, "mask_column": None, "mask_names": None}, "--mask_column"),
        (train_controlnet, base, "--caption_dropout 1"),
        (train_controlnet, {**base, "caption_dropout": 1.0, "lora_rank": 2}, "lora_rank"),
        (train_scribble, {"segmenter": NETWORK, "mask_names": None}, "--mask_names"),
        (train_scribble, {"segmenter": NETWORK, "mixing": "append"}, "synthetic_dirs"),
    ):
        with pytest.raises(ValueError, match=message):
            run_script(script.main, script.__name__, *flags(places, "refused", **changes))
    path = controlnet / "hint_encoder"
    path.rename(controlnet / "moved")
    try:
        recipe = {"model": str(saved("short_sd")), "method": "hint", "count": 1, "controlnet": str(controlnet),
                  "dataset_name": str(places / "scenes"), "mask_column": "scribble"}  # fmt: skip
        (places / "bad.yaml").write_text(yaml.safe_dump(recipe))
        asked = read_generation(places / "bad.yaml")
        with pytest.raises(ValueError, match="no hint_encoder/"):
            open_maker(asked)
    finally:
        (controlnet / "moved").rename(path)


def test_the_recipes_read():
    kinds = (TrainingConfig, DataConfig, ControlNetConfig)
    _, data, _ = parse_recipe(kinds, ["--config", str(train_controlnet.RECIPES / "controlnet_scenes.yaml")])
    assert data.mask_names == list(MASK_NAMES)
    kinds = (TrainingConfig, DataConfig, MixingConfig, SegmenterConfig, ScribbleConfig)
    _, data, _, network, _ = parse_recipe(kinds, ["--config", str(train_scribble.RECIPES / "scribble_scenes.yaml")])
    assert data.mask_names == list(MASK_NAMES)
    assert network.build(data.mask_names).network.config.num_labels == 16
