"""`Task`: what every use of features is, from images to a measured prediction."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Any, Self

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import Head


class Task(ABC):
    """A head on a base, with all that lies between an image and the prediction, and how it is measured.

    One task is one folder and one repository on the Hub, and has a card. `Probe` is the first; a task of one's own
    writes the abstract methods, and `check_task` of `diffusers_repr.testing` holds it to them.

    Args:
        head: The fitted head; None of a task that has none.
        recipe: Everything between an image and the head, plain data.
        denoiser: The base model.
        batch_size: Images read at a time.
    """

    head: Any
    recipe: Any

    def __init__(self, head: Head | None, recipe: Any, denoiser: Denoiser, batch_size: int = 64) -> None:
        self.head, self.recipe = None if head is None else head.eval(), recipe
        self.denoiser, self.batch_size = denoiser, batch_size

    @classmethod
    @abstractmethod
    def fit(cls, source: Any, train: Any, validation: Any = None, **settings: Any) -> Self:
        """Read the features of `train` and fit a head to them.

        Args:
            source: A `Denoiser`, a diffusers pipeline or a `FeatureExtractor`.
            train: Images with what is to be told of them.
            validation: The same, to tune on.
            **settings: Of the task.
        """

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Predict; of most tasks the first argument is images."""

    @abstractmethod
    def evaluate(self, data: Any, *, record: bool = True) -> dict[str, float]:
        """The task's measures on labelled images, by name.

        Args:
            data: As for `fit`.
            record: Keep them in the recipe, so that they are saved and stand in the card.
        """

    @abstractmethod
    def card(self, title: str) -> str:
        """The model card: what it is, how it was made, what was measured."""

    @abstractmethod
    def save_pretrained(self, folder: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write head, recipe and card, all or nothing.

        Args:
            folder: A new or empty folder, or one of the same kind, which is replaced.
            title: Heading of the card; the folder's name if None.
        """

    @classmethod
    @abstractmethod
    def from_pretrained(cls, id_or_folder: str | os.PathLike[str], base: Any = None, **kwargs: Any) -> Self:
        """Load what `save_pretrained` wrote, with its base.

        Args:
            id_or_folder: A folder or a Hub id.
            base: A folder, Hub id, pipeline or `Denoiser` to take instead of the recorded base.
            **kwargs: Of the task, and for loading the base.
        """

    def to(self, device: str | torch.device) -> Self:
        """Move the base model and the head."""
        target = self.denoiser.pipe if self.denoiser.pipe is not None else self.denoiser.model
        target.to(device)
        if self.denoiser.vae is not None:
            self.denoiser.vae.to(device)
        if self.head is not None:
            self.head.to(device)
        return self


__all__ = ["Task"]
