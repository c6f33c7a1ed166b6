"""What an open-vocabulary segmenter must know besides its weights: `panoptic.json`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads import OdiseHead
from diffusers_repr.heads.odise.vocabulary import TEMPLATE, Vocabulary
from diffusers_repr.hub.base_record import BaseRecord
from diffusers_repr.hub.schema import Check, integer, listing, number, record, text
from diffusers_repr.tasks.base import record_base
from diffusers_repr.tasks.levels import PACKAGES, recorded_levels
from diffusers_repr.tasks.panoptic_clip import record_clip
from diffusers_repr.tasks.panoptic_predictor import LABEL_WEIGHTS
from diffusers_repr.tasks.recipe import TaskRecipe
from diffusers_repr.tasks.recipe_schema import BASE

_CLIP: dict[str, Check] = {name: check for name, check in BASE.items() if name != "features"}
_NAMES = listing(text(1000), 1, 1000, distinct=True)
_NO_PROTOCOL: dict[str, Any] = {"name": "not recorded", "version": 0}
_NO_DATA: dict[str, Any] = {"dataset": "not recorded", "split": "not recorded", "rows": 0}


@dataclass(frozen=True)
class PanopticRecipe(TaskRecipe):
    """Everything between an image, words and the head of ODISE.

    Attributes:
        vocabulary: Of the training: of each class its names.
        stuff: Numbers of the classes that have no instances.
        template: Of the prompts, with `{}` for the name.
        weights: CLIP's share for classes of the training and for new ones.
        clip: The CLIP it was trained with.
    """

    NOUN: ClassVar[str] = "open-vocabulary segmenter"
    FILE: ClassVar[str] = "panoptic.json"
    FORMAT: ClassVar[str] = "diffusers_repr.panoptic/1"
    OWN: ClassVar[Mapping[str, Check]] = {
        "vocabulary": listing(_NAMES, 1),
        "stuff": listing(integer(0), 0, distinct=True),
        "template": text(1000, pattern=r"[^{}]*\{\}[^{}]*", what="a text with one {}"),
        "weights": listing(number(0, 1), 2, 2),
        "clip": record(_CLIP),
    }
    MODELS: ClassVar[Mapping[str, Mapping[str, Check]]] = {"base": BASE, "clip": _CLIP}

    vocabulary: tuple[tuple[str, ...], ...]
    stuff: tuple[int, ...]
    template: str
    weights: tuple[float, float]
    clip: BaseRecord

    def __post_init__(self) -> None:
        for name, value in (
            ("vocabulary", tuple(tuple(names) for names in self.vocabulary)),
            ("stuff", tuple(sorted(self.stuff))),
            ("weights", tuple(self.weights)),
        ):
            object.__setattr__(self, name, value)

    @property
    def foreign(self) -> str | None:
        """The head reads its features itself, and checks that they are there."""
        return "OdiseHead"

    @property
    def words(self) -> Vocabulary:
        """The vocabulary of the training."""
        return Vocabulary(self.vocabulary, frozenset(self.stuff))

    def with_clip(self, name: str, revision: str | None = None) -> Self:
        """A copy whose CLIP is the Hub id `name`."""
        return replace(self, clip=replace(self.clip, name=name, local=False, revision=revision, commit=None))

    @classmethod
    def make(
        cls,
        head: OdiseHead,
        denoiser: Denoiser,
        towers: ImageTextEncoder,
        words: Vocabulary,
        *,
        template: str = TEMPLATE,
        weights: tuple[float, float] = LABEL_WEIGHTS,
        protocol: Mapping[str, Any] | None = None,
        train: Mapping[str, Any] | None = None,
        base: tuple[str | None, str | None] = (None, None),
        clip: str | None = None,
    ) -> PanopticRecipe:
        """The recipe of a head, trained or in training.

        Args:
            head: The head.
            denoiser: Its base.
            towers: Its CLIP.
            words: Vocabulary of the training.
            template: Of the prompts.
            weights: CLIP's share for classes of the training and for new ones.
            protocol: How it is trained.
            train: Name, split and rows of the data.
            base: Name and revision to write of the base, if not those it was loaded by.
            clip: Name to write of the CLIP, if not that it was loaded by.
        """
        layers = {f"{tap.part}.{tap.path}": tap.channels for tap in head.taps}
        timestep = head.config["timestep"]
        asked = 0 if timestep is None else timestep
        return cls(
            base=record_base(denoiser, layers, *base),
            layers=tuple(layers),
            levels=recorded_levels([denoiser.level(asked)], [asked]),
            label_names=words.names,
            where="input",
            noise="clean" if timestep is None else "shared",
            seed=42,  # of the noise of `read_taps`
            ensemble_size=1,
            image_size=denoiser.image_size,
            preprocessing={
                "resize": "square windows, bicubic to the base's size",
                "channels": denoiser.image_channels,
                "range": [-1, 1],
            },
            sample_posterior=False,
            prompt="",
            class_labels=None,
            protocol=dict(protocol or _NO_PROTOCOL),
            train=dict(train or _NO_DATA),
            scores=(),
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
            vocabulary=words.classes,
            stuff=tuple(words.stuff),
            template=template,
            weights=weights,
            clip=record_clip(towers, clip),
        )


__all__ = ["PanopticRecipe"]
