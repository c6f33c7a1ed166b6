"""Composed scenes: coloured digits and shapes on a dark ground, with exact captions and exact masks.

The digits are the real ones of scikit-learn, each split of scenes from the split of digits of its name. Everything is
drawn from a seed, so a scene is the same on every machine. What a caption or a mask says is true by construction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, List, Value
from PIL import Image as PILImage

from diffusers_repr.data.digits import load_digits_splits

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPE_NAMES = ("circle", "square", "triangle", "cross", "ring")
KINDS = (*DIGIT_NAMES, *SHAPE_NAMES)
PLURALS = {"six": "sixes", "cross": "crosses", **{kind: f"{kind}s" for kind in KINDS if kind not in ("six", "cross")}}
COLOURS = {
    "red": (225, 50, 45),
    "green": (50, 190, 70),
    "blue": (60, 95, 240),
    "yellow": (235, 210, 50),
    "purple": (170, 60, 200),
    "white": (240, 240, 240),
}
COUNTS = ("a", "two", "three")
# One colour of each kind, all colours in turn: in no scene of `train` and `validation`.
HELD_OUT = tuple((list(COLOURS)[at % len(COLOURS)], kind) for at, kind in enumerate(KINDS))
SPLITS = {"train": "train", "validation": "validation", "test": "test", "held_out": "test"}  # scenes -> digits
SIDE = 32
_SEEDS = {split: place for place, split in enumerate(SPLITS)}
_OPAQUE = 0.4  # least share of a pixel that a thing covers where the mask is its own
_VISIBLE = 0.5  # least share of a covered thing that stays visible
FEATURES = Features(
    {
        "image": Image(),
        "caption": Value("string"),
        "mask": Image(),
        "panoptic": Image(),
        "things": List({"id": Value("int32"), "kind": ClassLabel(names=list(KINDS)),
                        "colour": ClassLabel(names=list(COLOURS)), "box": List(Value("int32"))}),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Attributes:
        colour: One of `COLOURS`.
        kind: One of `KINDS`.
        mask: `(H, W)` boolean: the pixels where it is seen.
    """

    colour: str
    kind: str
    mask: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the mask, in pixels, right and bottom one past the last."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Scene:
    """A picture with what is in it.

    Attributes:
        image: `(H, W, 3)` uint8.
        things: Back to front.
        caption: A true sentence about all of them.
    """

    image: np.ndarray
    things: tuple[Thing, ...]
    caption: str

    def panoptic(self) -> np.ndarray:
        """`(H, W)` uint8: 0 for the ground, n for the nth of `things`."""
        found = np.zeros(self.image.shape[:2], np.uint8)
        for number, thing in enumerate(self.things, start=1):
            found[thing.mask] = number
        return found

    def mask(self) -> np.ndarray:
        """`(H, W)` uint8, the class of each pixel: 0 for the ground, 1 + place in `KINDS` for a thing."""
        classes = np.array([0, *(1 + KINDS.index(thing.kind) for thing in self.things)], np.uint8)
        return classes[self.panoptic()]


def describe(things: Sequence[tuple[str, str]], colours: bool = True) -> str:
    """The caption of `(colour, kind)` pairs; like ones are counted together, in the order they come.

    Args:
        things: At most three of a sort.
        colours: Whether to name colours.

    Example:
        >>> describe([("red", "six"), ("blue", "ring"), ("red", "six")])
        'two red sixes and a blue ring'
    """
    sorts = Counter((colour if colours else "", kind) for colour, kind in things)
    phrases = []
    for (colour, kind), count in sorts.items():
        words = [word for word in (colour, kind if count == 1 else PLURALS[kind]) if word]
        counted = "an" if count == 1 and words[0] == "eight" else COUNTS[count - 1]
        phrases.append(" ".join([counted, *words]))
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def draw_scene(
    rng: np.random.Generator,
    digits: Sequence[Sequence[np.ndarray]],
    *,
    held_out: Literal["without", "only", "any"] = "any",
    kinds: Sequence[str] = KINDS,
    overlap: bool = False,
    colourless: float = 0.2,
) -> Scene:
    """One scene of one to three things: one or two sorts, of which a caption may count several.

    Args:
        rng: All that is drawn comes from it.
        digits: For each digit its images, `(8, 8)` in [0, 1].
        held_out: Whether the pairs of `HELD_OUT` may occur; `only`: at least one does.
        kinds: What may occur.
        overlap: Let things cover one another in part; otherwise nothing lies in the box of a later one, or next to it.
        colourless: Share of the captions that name no colours.
    """
    sorts = _draw_sorts(rng, held_out, kinds)
    while True:
        canvas, placed, covered = _ground(rng), [], np.zeros((SIDE, SIDE), np.uint8)
        for number, (colour, kind) in enumerate(sorts, start=1):
            cover = _place(rng, _glyph(rng, kind, digits), covered, overlap)
            if cover is None:
                break
            tone = np.array(COLOURS[colour]) + rng.uniform(-15, 15, 3)
            canvas = canvas * (1 - cover[..., None]) + tone * cover[..., None]
            covered[cover > _OPAQUE] = number
            placed.append((colour, kind, int((cover > _OPAQUE).sum())))
        masks = [covered == number for number in range(1, len(placed) + 1)]
        seen = all(mask.sum() >= _VISIBLE * whole for mask, (*_, whole) in zip(masks, placed, strict=True))
        if len(placed) == len(sorts) and seen:
            break
    things = tuple(Thing(colour, kind, mask) for (colour, kind, _), mask in zip(placed, masks, strict=True))
    image = np.rint(canvas).clip(0, 255).astype(np.uint8)
    return Scene(image, things, describe(sorts, colours=rng.random() >= colourless))


def scenes(split: str, count: int, seed: int = 0, **how: Any) -> Iterator[Scene]:
    """The first `count` scenes of a split, each by a generator of its own.

    Args:
        split: train, validation, test, or held_out, whose scenes have the digits of test and each a pair of colour and
            kind that no scene of the others has.
        count: How many.
        seed: Another gives other scenes.
        **how: `kinds`, `overlap` and `colourless` of `draw_scene`.

    Raises:
        ValueError: For another split.
    """
    if split not in SPLITS:
        raise ValueError(f"No split {split!r} of the scenes; there are {', '.join(SPLITS)}.")
    digits = _digits(SPLITS[split])
    held_out: Literal["without", "only"] = "only" if split == "held_out" else "without"
    for index in range(count):
        rng = np.random.default_rng([seed, _SEEDS[split], index])
        yield draw_scene(rng, digits, held_out=held_out, **how)


def load_scenes(split: str, count: int, seed: int = 0, **how: Any) -> Dataset:
    """As `scenes`, a `datasets.Dataset`.

    Its columns: `image`; `caption`; `mask`, class ids as `MASK_NAMES` names them; `panoptic`, 0 for the ground and the
    `id` of a thing elsewhere; `things`, for each its `id`, `kind`, `colour` and `box` (left, top, right, bottom).
    """
    rows = [_row(scene) for scene in scenes(split, count, seed, **how)]
    columns = {name: [row[name] for row in rows] for name in FEATURES}
    return Dataset.from_dict(columns, info=DatasetInfo(features=FEATURES, dataset_name="scenes"))


MASK_NAMES = ("ground", *KINDS)


def _row(scene: Scene) -> dict[str, Any]:
    things = [
        {"id": number, "kind": thing.kind, "colour": thing.colour, "box": list(thing.box)}
        for number, thing in enumerate(scene.things, start=1)
    ]
    pictures = {"image": scene.image, "mask": scene.mask(), "panoptic": scene.panoptic()}
    made = {name: PILImage.fromarray(pixels) for name, pixels in pictures.items()}
    return {**made, "caption": scene.caption, "things": things}


@lru_cache(maxsize=len(SPLITS))
def _digits(split: str) -> list[list[np.ndarray]]:
    rows = load_digits_splits()[split]
    found: list[list[np.ndarray]] = [[] for _ in DIGIT_NAMES]
    for image, label in zip(rows["image"], rows["label"], strict=True):
        found[label].append(np.asarray(image, np.float64) / 255)
    return found


def _draw_sorts(rng: np.random.Generator, held_out: str, kinds: Sequence[str]) -> list[tuple[str, str]]:
    """`(colour, kind)` of each thing, like ones together."""
    counts = [(1,), (2,), (3,), (1, 1), (1, 2), (2, 1)][rng.choice(6, p=[0.35, 0.15, 0.1, 0.25, 0.075, 0.075])]
    while True:
        pairs = [(str(rng.choice(list(COLOURS))), str(rng.choice(list(kinds)))) for _ in counts]
        among = [pair in HELD_OUT for pair in pairs]
        allowed = {"without": not any(among), "only": any(among), "any": True}[held_out]
        if allowed and len(set(pairs)) == len(pairs):
            return [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]


def _ground(rng: np.random.Generator) -> np.ndarray:
    """`(H, W, 3)`: dark grey, brighter towards one side."""
    angle, steps = rng.uniform(0, 2 * np.pi), np.linspace(-1, 1, SIDE)
    slope = np.cos(angle) * steps[None, :] + np.sin(angle) * steps[:, None]
    return np.repeat((rng.uniform(20, 60) + rng.uniform(0, 12) * slope)[..., None], 3, axis=2)


def _glyph(rng: np.random.Generator, kind: str, digits: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """`(h, w)` in [0, 1]: how much of each pixel a thing covers, without empty borders."""
    if kind in DIGIT_NAMES:
        images = digits[DIGIT_NAMES.index(kind)]
        side = int(rng.integers(12, 15))
        small = PILImage.fromarray(images[int(rng.integers(len(images)))].astype(np.float32))
        cover = np.clip(np.asarray(small.resize((side, side), PILImage.Resampling.BICUBIC)) * 1.2, 0, 1)
    else:
        cover = _shape(kind, int(rng.integers(9, 14)))
    rows, columns = np.flatnonzero(cover.max(1) > 0.1), np.flatnonzero(cover.max(0) > 0.1)
    return cover[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _shape(kind: str, side: int, fine: int = 4) -> np.ndarray:
    """`(side, side)`: a shape on a grid `fine` times as fine, averaged."""
    steps = (np.arange(side * fine) + 0.5) / (side * fine) * 2 - 1
    x, y = np.meshgrid(steps, steps)
    radius = np.hypot(x, y)
    inside = {
        "circle": radius < 1,
        "square": np.ones_like(x, dtype=bool),
        "triangle": np.abs(x) < (y + 1) / 2,
        "cross": (np.abs(x) < 0.3) | (np.abs(y) < 0.3),
        "ring": (radius < 1) & (radius > 0.55),
    }[kind]
    return inside.reshape(side, fine, side, fine).mean((1, 3))


def _place(rng: np.random.Generator, glyph: np.ndarray, covered: np.ndarray, overlap: bool) -> np.ndarray | None:
    """`(H, W)`: the glyph somewhere on the canvas, a pixel away from what is there already; None if it found none."""
    height, width = glyph.shape
    for _ in range(30):
        top, left = (int(rng.integers(0, SIDE - side + 1)) for side in (height, width))
        near = covered[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1]
        if overlap or not near.any():
            cover = np.zeros((SIDE, SIDE))
            cover[top : top + height, left : left + width] = glyph
            return cover
    return None


__all__ = [
    "COLOURS",
    "HELD_OUT",
    "KINDS",
    "MASK_NAMES",
    "SPLITS",
    "Scene",
    "Thing",
    "describe",
    "draw_scene",
    "load_scenes",
    "scenes",
]
