"""The questions of `zero_shot.py`: which images, which classes, and what the model is told of each."""

import dataclasses
import itertools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.digits import load_digits_splits
from diffusers_repr.data.scenes import COLOURS, KINDS, Scene, describe, scenes
from diffusers_repr.data.transforms import augment
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.tasks.denoising_errors.conditions import ConditionRows, encode_conditions
from diffusers_repr.tasks.denoising_errors.rules import Units

Ask = Literal["digit", "kind", "colour"]


@dataclasses.dataclass(frozen=True)
class Question:
    """One classification.

    Attributes:
        name: Of its rows and files.
        classes: Names of the classes.
        conditions: What the model is told, a row a prompt.
        units: What competes.
        train: Pixels `(N, C, H, W)` in [-1, 1] and labels of images that the model has seen, for the levels' order.
        test: The same of images that it has not seen.
        real: How many of these, from the first on, are as they were drawn or written; the rest are moved copies.
    """

    name: str
    classes: tuple[str, ...]
    conditions: ConditionRows
    units: Units
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    real: int


def question(denoiser: Denoiser, ask: Ask, several: bool, calibration: int, count: int) -> Question:
    """Which digit is it, of a class-conditional model; which kind or colour has the one thing, of one with prompts.

    Args:
        denoiser: The model.
        ask: What is asked.
        several: Whether kinds have a prompt for every colour, of which the best counts; colours have one for every
            kind anyway, for no caption has a colour alone.
        calibration: Images for the levels' order.
        count: Images to classify.
    """
    if ask == "digit":
        names = tuple(str(digit) for digit in range(10))
        told = encode_conditions(denoiser, class_labels=list(range(10)), size=denoiser.image_size)
        # The split's first rows are nearly of one class.
        rows = load_digits_splits()["train"].shuffle(seed=0).select(range(calibration))
        train = denoiser.pixels(rows["image"]), torch.tensor(rows["label"])
        pixels, labels, real = held_out(count)
        return Question(ask, names, told, Units.of(range(10)), train, (pixels, labels), real)
    names, prompts, of_prompt = prompts_of(ask, several)
    told = encode_conditions(denoiser, prompts=prompts, size=denoiser.image_size)
    units = Units.of(of_prompt, "best" if len(prompts) > len(names) else "mean")
    train, test = (single_things(split, number, ask) for split, number in (("train", calibration), ("test", count)))
    return Question(f"{ask}{'-several' if several else ''}", names, told, units, train, test, count)


def prompts_of(ask: Ask, several: bool) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Classes, prompts as captions of the training name a single thing, and the class of each prompt."""
    if ask == "colour":
        pairs = [(colour, kind, at) for at, colour in enumerate(COLOURS) for kind in KINDS]
        return tuple(COLOURS), [describe([(c, k)]) for c, k, _ in pairs], [at for *_, at in pairs]
    if several:
        pairs = [(colour, kind, at) for at, kind in enumerate(KINDS) for colour in COLOURS]
        return KINDS, [describe([(c, k)]) for c, k, _ in pairs], [at for *_, at in pairs]
    return KINDS, [describe([("", kind)], colours=False) for kind in KINDS], list(range(len(KINDS)))


def single_things(split: str, count: int, ask: Ask) -> tuple[Tensor, Tensor]:
    """Pixels and labels of the first scenes of a split that have one thing."""
    found: list[Scene] = []
    for scene in scenes(split, 8 * count + 100):
        if len(scene.things) == 1:
            found.append(scene)
        if len(found) == count:
            break
    pixels = torch.from_numpy(np.stack([scene.image for scene in found])).permute(0, 3, 1, 2).float() / 127.5 - 1
    places = list(KINDS) if ask == "kind" else list(COLOURS)
    return pixels, torch.tensor([places.index(getattr(scene.things[0], ask)) for scene in found])


def held_out(count: int) -> tuple[Tensor, Tensor, int]:
    """Pixels and labels of digits that the model was not trained on, and how many of them are as they were written.

    These are validation and test together, 800; beyond them come copies, turned, moved and scaled as in training.
    """
    splits = load_digits_splits()
    images = list(itertools.chain(*(splits[split]["image"] for split in ("test", "validation"))))
    labels = torch.tensor([*splits["test"]["label"], *splits["validation"]["label"]])
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None].float() / 127.5 - 1
    real = min(count, len(pixels))
    if real == count:
        return pixels[:real], labels[:real], real
    more = torch.arange(count - real) % len(pixels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moved = augment(pixels[more], False, 10.0, 0.0875, 0.1)
    return torch.cat([pixels[:real], moved]), torch.cat([labels[:real], labels[more]]), real
