"""`train_odise.py`: a run on scenes with an untrained base and CLIP: it learns, measures, and saves what loads."""

import json

import numpy as np
import pytest
import torch
import train_odise

from diffusers_repr.config import parse_recipe
from diffusers_repr.data.panoptic_data import PanopticConfig, PanopticTrainData, to_maps
from diffusers_repr.data.scenes import KINDS, load_scenes
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads import OdiseHead
from diffusers_repr.objectives.odise import OdiseConfig, OdiseObjective
from diffusers_repr.testing import check_objective
from diffusers_repr.training import TrainingConfig
from tests.heads.odise_cases import SMALL, tiny_towers
from tests.testers.models import saved
from tests.training.loop_cases import forget_accelerate

COLUMNS = {"segments_column": "things", "class_key": "kind", "ground": "ground"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odise")
    (folder / "scenes/data").mkdir(parents=True)
    for split, count in (("train", 24), ("test", 6)):
        load_scenes(split, count).to_parquet(folder / f"scenes/data/{split}-00000-of-00001.parquet")
    towers = tiny_towers(grow=4)
    towers.model.save_pretrained(folder / "clip")
    towers.tokenizer.save_pretrained(folder / "clip")
    (folder / "clip/preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    )
    return folder


def test_a_run(places, tmp_path):
    flags = {
        "pretrained_model_name_or_path": saved("sd"), "clip": places / "clip", "dataset_name": places / "scenes",
        "head": json.dumps({**SMALL, "strides": [2, 8]}), "points": 64, "max_train_steps": 9, "train_batch_size": 4,
        "learning_rate": 0.003, "logging_steps": 3, "eval_splits": "test", "eval_images": 2,
        "output_dir": tmp_path / "out", **COLUMNS,
    }  # fmt: skip
    try:
        train_odise.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    finally:
        forget_accelerate()
    log = [json.loads(line) for line in (tmp_path / "out/loss.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    measured = json.loads((tmp_path / "out/evaluation.jsonl").read_text())
    assert set(measured) == {"step", *(f"test_{name}" for name in ("pq", "sq", "rq", "mean_iou", "pq_alone"))}
    head = OdiseHead.from_pretrained(tmp_path / "out")
    assert head.config["vocabulary"][-1] == ["ground"]
    assert list(head.config["stuff"]) == [len(KINDS)]
    assert head.captioner.text_gate.abs().max() > 0  # the gates have opened


def test_contract(places):
    config = OdiseConfig(str(saved("sd")), clip=str(places / "clip"), head={**SMALL, "strides": [2, 8]}, points=32)
    data = PanopticTrainData(load_scenes("train", 3), PanopticConfig("scenes", **COLUMNS), 3, (32, 32))
    batch = torch.utils.data.default_collate([data[at] for at in range(3)])
    words, towers = config.vocabulary(data.class_names, ["ground"]), ImageTextEncoder.from_pretrained(config.clip)
    assert (towers.mean, towers.std) == ((0.5,) * 3, (0.25,) * 3)
    torch.manual_seed(0)
    objective = OdiseObjective(config.load_base(), towers, words, config)
    check_objective(objective, data.on_device(batch))
    with pytest.raises(ValueError, match="panoptic masks"):
        objective.check_batch({"pixel_values": batch["pixel_values"]})
    with pytest.raises(ValueError, match="Pass --clip"):
        OdiseConfig("base")
    with pytest.raises(TypeError, match="CLIPModel"):
        ImageTextEncoder.from_pretrained(saved("sd") / "text_encoder")


def test_maps_of_scenes():
    rows = load_scenes("train", 12)
    data = PanopticTrainData(rows, PanopticConfig("scenes", **COLUMNS), 3, (32, 32))
    for at in range(12):
        one = data[at]
        found = to_maps(one["panoptic"][None], one["segment_classes"][None])[0]
        things = {thing["id"]: thing["kind"] for thing in rows[at]["things"]}
        raw = torch.from_numpy(np.array(rows[at]["panoptic"]))
        for number, kind in things.items():
            assert (found.class_map()[raw == number] == kind).all()
        assert (found.class_map()[raw == 0] == len(KINDS)).all()
        assert len(found.classes) == len(things) + 1
    void = PanopticTrainData(rows, PanopticConfig("scenes", segments_column="things", class_key="kind"), 3, (32, 32))
    assert not void[0]["panoptic"][torch.from_numpy(np.array(rows[0]["panoptic"])) == 0].any()
    shown = {thing["kind"] for row in rows for thing in row["things"]}
    barred = KINDS[min(shown)]
    fewer = PanopticTrainData(rows, PanopticConfig("scenes", **COLUMNS, exclude=[barred]), 3, (32, 32))
    assert len(fewer) == sum(KINDS.index(barred) not in {t["kind"] for t in row["things"]} for row in rows)
    for changes, message in (
        ({"exclude": ["hat"]}, "names 'hat'"),
        ({"segments_column": "boxes"}, "no column 'boxes'"),
        ({"class_key": "box"}, "a ClassLabel"),
    ):
        with pytest.raises(ValueError, match=message):
            PanopticTrainData(rows, PanopticConfig("scenes", **{**COLUMNS, **changes}), 3, (32, 32))


def test_the_recipe_reads():
    kinds = (TrainingConfig, PanopticConfig, OdiseConfig)
    recipe = str(train_odise.RECIPES / "odise_scenes.yaml")
    _, panoptic, odise = parse_recipe(kinds, ["--config", recipe])
    assert panoptic.ground == "ground"
    assert odise.head["strides"] == [1, 8]
