"""`train_odise.py`: a run on scenes with an untrained base and CLIP: it learns, measures, and saves what loads."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import train_odise

from diffusers_repr.config import parse_recipe
from diffusers_repr.data.panoptic_data import PanopticConfig, PanopticTrainData, load_panoptic, to_maps
from diffusers_repr.data.scenes import COLOURS, KINDS, load_scenes
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.hub.allowed import kind_of
from diffusers_repr.objectives.odise import OdiseConfig, OdiseObjective
from diffusers_repr.tasks import OpenVocabularySegmenter
from diffusers_repr.testing import check_objective
from diffusers_repr.training import TrainingConfig
from tests.heads.odise_cases import SMALL, save_clip, tiny_towers
from tests.testers.models import saved
from tests.training.loop_cases import forget_accelerate

COLUMNS = {"segments_column": "things", "class_key": "kind", "ground": "ground"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odise")
    (folder / "scenes/data").mkdir(parents=True)
    for split, count in (("train", 24), ("test", 6)):
        load_scenes(split, count).to_parquet(folder / f"scenes/data/{split}-00000-of-00001.parquet")
    save_clip(tiny_towers(grow=4), folder / "clip", mean=0.5)
    return folder


def test_a_run(places, tmp_path):
    shown = load_scenes("test", 1)["things"][0][0]
    barred, at = (
        f"{list(COLOURS)[shown['colour']]} {KINDS[shown['kind']]}",
        shown["colour"] * len(KINDS) + shown["kind"],
    )
    flags = {
        "pretrained_model_name_or_path": saved("short_sd"), "clip": places / "clip", "dataset_name": places / "scenes",
        "head": json.dumps({**SMALL, "strides": [2, 8]}), "points": 64, "max_train_steps": 9, "train_batch_size": 4,
        "learning_rate": 0.003, "logging_steps": 3, "eval_splits": "test", "eval_images": 2,
        "output_dir": tmp_path / "out", "template": "a {}", **COLUMNS, "class_key": "colour kind",
        "exclude": barred,
    }  # fmt: skip
    try:
        train_odise.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    finally:
        forget_accelerate()
    log = [json.loads(line) for line in (tmp_path / "out/loss.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.95 * log[0]["loss"]
    measured = json.loads((tmp_path / "out/evaluation.jsonl").read_text())
    names = ("pq", "sq", "rq", "mean_iou", "pq_known", "pq_new", "pq_alone", "pq_known_alone", "pq_new_alone")
    assert set(measured) == {"step", *(f"test_{name}" for name in names)}
    task = OpenVocabularySegmenter.from_pretrained(tmp_path / "out")
    recipe, pairs = task.recipe, [f"{colour} {kind}" for colour in COLOURS for kind in KINDS]
    assert recipe.label_names == (*pairs[:at], *pairs[at + 1 :], "ground")
    assert recipe.stuff == (len(pairs) - 1,)
    assert (recipe.protocol["steps"], recipe.train["split"], recipe.template) == (9, "train", "a {}")
    assert {s.name: s.value for s in recipe.scores} == {
        name: measured[f"test_{name}"] for name in ("pq", "pq_known", "pq_new", "mean_iou")
    }
    assert task.head.captioner.text_gate.abs().max() > 0  # the gates have opened
    assert kind_of(tmp_path / "out") == "open-vocabulary segmenter"
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "out").glob("*.json"))


def test_fit(places, tmp_path):
    config = PanopticConfig(str(places / "scenes"), **COLUMNS)
    data = load_panoptic(config, 3, (32, 32))
    base, clip = Denoiser.from_pretrained(saved("short_sd")), places / "clip"
    training = TrainingConfig(
        output_dir=str(tmp_path / "run"), max_train_steps=2, train_batch_size=2, learning_rate=1e-3, logging_steps=1
    )
    try:
        made = OpenVocabularySegmenter.fit(
            base, data, load_panoptic(dataclasses.replace(config, dataset_split="test"), 3, (32, 32)),
            clip=clip, training=training, head={**SMALL, "strides": [2, 8]}, points=32, template="a {}",
        )  # fmt: skip
    finally:
        forget_accelerate()
    assert [(s.name, s.split, s.rows) for s in made.recipe.scores] == [
        (name, "test", 6) for name in ("pq", "pq_known", "mean_iou")
    ]
    assert made.recipe.label_names == (*KINDS, "ground")
    again = OpenVocabularySegmenter.from_pretrained(tmp_path / "run")
    image = torch.rand(3, 32, 32)
    assert torch.equal(made(image).class_maps[0], again(image).class_maps[0])


def test_contract(places):
    config = OdiseConfig(
        str(saved("short_sd")), clip=str(places / "clip"), head={**SMALL, "strides": [2, 8]}, points=32
    )
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
        ImageTextEncoder.from_pretrained(saved("short_sd") / "text_encoder")


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
    assert fewer.class_names == [kind for kind in (*KINDS, "ground") if kind != barred]
    both = PanopticTrainData(rows, PanopticConfig("scenes", **{**COLUMNS, "class_key": "colour kind"}), 3, (32, 32))
    for at in range(12):
        named = [both.class_names[label] for label in both[at]["segment_classes"] if label >= 0]
        assert named == [*(f"{list(COLOURS)[t['colour']]} {KINDS[t['kind']]}" for t in rows[at]["things"]), "ground"]
    kept = [at for at, row in enumerate(rows) if KINDS.index(barred) not in {t["kind"] for t in row["things"]}]
    for at, row in enumerate(kept):
        named = [fewer.class_names[label] for label in fewer[at]["segment_classes"] if label >= 0]
        assert named == [*(KINDS[thing["kind"]] for thing in rows[row]["things"]), "ground"]
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
