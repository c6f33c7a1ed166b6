"""Composed scenes: captions and masks say what is drawn, held-out pairs are held out, a seed decides all."""

import re
from collections import Counter

import numpy as np
import pytest

from diffusers_repr.data import DataConfig, load_train_data
from diffusers_repr.data.scenes import (
    COLOURS,
    HELD_OUT,
    KINDS,
    MASK_NAMES,
    PLURALS,
    SPLITS,
    describe,
    load_scenes,
    scenes,
)

NUMBERS = {"a": 1, "an": 1, "two": 2, "three": 3}


def read(caption: str) -> Counter:
    """What a caption says, read word by word: (colour or None, kind) -> count."""
    singular = {plural: kind for kind, plural in PLURALS.items()} | {kind: kind for kind in KINDS}
    found = Counter()
    for phrase in re.split(r", | and ", caption):
        number, *colour, kind = phrase.split()
        found[colour[0] if colour else None, singular[kind]] = NUMBERS[number]
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_a_caption_counts_what_is_there(split):
    named = 0
    for scene in scenes(split, 60):
        said = read(scene.caption)
        coloured = None not in {colour for colour, _ in said}
        named += coloured
        assert said == Counter((thing.colour if coloured else None, thing.kind) for thing in scene.things)
        assert 1 <= len(scene.things) <= 3
    assert 20 < named < 60  # a fifth of the captions names no colours


def test_captions_in_words():
    assert describe([("red", "six"), ("blue", "ring"), ("red", "six")]) == "two red sixes and a blue ring"
    assert describe([("red", "eight"), ("blue", "eight")], colours=False) == "two eights"
    assert describe([("red", "eight")], colours=False) == "an eight"
    assert describe([("red", "one"), ("blue", "one"), ("red", "two")]) == "a red one, a blue one and a red two"


def test_pairs_are_held_out():
    assert len(set(HELD_OUT)) == len(KINDS)
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS)
    for split in ("train", "validation", "test"):
        assert not any((t.colour, t.kind) in HELD_OUT for scene in scenes(split, 150) for t in scene.things)
    assert all(any((t.colour, t.kind) in HELD_OUT for t in scene.things) for scene in scenes("held_out", 60))


@pytest.mark.parametrize("overlap", [False, True])
def test_masks_are_where_the_colours_are(overlap):
    """Each thing's pixels have its colour, nearer than any other, and the ground has none."""
    covered = False
    palette = np.array(list(COLOURS.values()), float)
    for scene in scenes("train", 60, overlap=overlap):
        panoptic, mask = scene.panoptic(), scene.mask()
        assert set(np.unique(panoptic)) == set(range(len(scene.things) + 1))
        for number, thing in enumerate(scene.things, start=1):
            assert np.array_equal(panoptic == number, thing.mask)
            assert set(mask[thing.mask]) == {1 + KINDS.index(thing.kind)}
            mean = scene.image[thing.mask].mean(0)
            direction = mean / np.linalg.norm(mean)
            cosines = palette @ direction / np.linalg.norm(palette, axis=1)
            assert list(COLOURS)[cosines.argmax()] == thing.colour
        ground = scene.image[panoptic == 0].astype(int)
        assert np.median(np.ptp(ground, axis=1)) == 0  # grey
        assert not mask[panoptic == 0].any()
        apart = True
        for number, thing in enumerate(scene.things, start=1):
            left, top, right, bottom = thing.box
            near = panoptic[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1]
            apart &= not ((near > 0) & (near < number)).any()
        assert apart or overlap
        covered |= not apart
    assert covered == overlap


def test_a_seed_and_a_place_decide_a_scene():
    one, longer = list(scenes("test", 3)), list(scenes("test", 5))
    assert all(np.array_equal(a.image, b.image) and a.caption == b.caption for a, b in zip(one, longer, strict=False))
    assert not np.array_equal(next(scenes("test", 1, seed=1)).image, one[0].image)
    assert not np.array_equal(next(scenes("train", 1)).image, next(scenes("validation", 1)).image)
    with pytest.raises(ValueError, match="No split 'tset'.*held_out"):
        next(scenes("tset", 1))
    assert {t.kind for scene in scenes("train", 20, kinds=["ring", "two"]) for t in scene.things} == {"ring", "two"}


def test_a_dataset_of_scenes():
    rows, made = load_scenes("validation", 6), list(scenes("validation", 6))
    for row, scene in zip(rows, made, strict=True):
        assert np.array_equal(np.asarray(row["image"]), scene.image)
        assert np.array_equal(np.asarray(row["panoptic"]), scene.panoptic())
        assert [rows.features["things"].feature["kind"].int2str(t["kind"]) for t in row["things"]] == [
            thing.kind for thing in scene.things
        ]
        left, top, right, bottom = row["things"][0]["box"]
        inside = scene.panoptic()[top:bottom, left:right] == 1
        assert inside.sum() == scene.things[0].mask.sum()
        assert inside[0].any()
        assert inside[:, -1].any()
    columns = {"image_column": "image", "caption_column": "caption", "mask_column": "mask", "label_column": "none"}
    data = load_train_data(DataConfig(**columns, mask_names=list(MASK_NAMES)), 3, 32, dataset=rows)
    assert data[2]["caption"] == made[2].caption
    assert np.array_equal(data[2]["masks"].numpy(), made[2].mask())
