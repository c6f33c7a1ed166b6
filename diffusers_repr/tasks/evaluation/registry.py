"""Tasks by name, for recipes: of each its class, how its data are opened, what `fit` is told, and its pictures."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffusers_repr.tasks.evaluation import fits, pictures
from diffusers_repr.tasks.evaluation.bases import DENOISER, ENCODER, BaseKind
from diffusers_repr.tasks.evaluation.data import (
    open_attributed_images,
    open_labelled_images,
    open_masked_images,
    open_pairs,
    open_panoptic_images,
)
from diffusers_repr.tasks.task import Task

Opener = Callable[..., Any]
Drawer = Callable[[Any, Any], dict[str, Image.Image]]


@dataclass(frozen=True)
class TaskKind:
    """A task as recipes know it.

    Attributes:
        name: What a recipe calls it.
        place: Of its class, `module:class`, imported when it is asked for; of a class that was registered the class.
        open: `(path, split, *, keys of the section data) -> data` of `fit` and `evaluate`.
        settings: Keyword-only arguments, which are the keys of the section `fit`, to arguments of `fit`; None: those
            of `fit` itself.
        pictures: `(task, data) -> pictures by name`; None: there are none.
        headline: The measure that a table shows; None: the first.
        base: What it is fitted on.
    """

    name: str
    place: str | type[Task]
    open: Opener = open_labelled_images
    settings: Callable[..., dict[str, Any]] | None = None
    pictures: Drawer | None = None
    headline: str | None = None
    base: BaseKind = DENOISER

    def task(self) -> type[Task]:
        """The class."""
        if not isinstance(self.place, str):
            return self.place
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)


_KINDS: dict[str, TaskKind] = {
    kind.name: kind
    for kind in (
        TaskKind(
            "classification", "diffusers_repr.tasks.probe:Probe", settings=fits.classification,
            pictures=pictures.of_classification, headline="accuracy",
        ),
        TaskKind(
            "segmentation", "diffusers_repr.tasks.segmentation:Segmenter", open_masked_images, fits.segmentation,
            pictures.of_segmentation, "mean_iou",
        ),
        TaskKind(
            "correspondence", "diffusers_repr.tasks.correspondence:Correspondence", open_pairs, fits.correspondence,
            pictures.of_correspondence, "pck",
        ),
        TaskKind("sift", "diffusers_repr.tasks.sift:SiftCorrespondence", open_pairs, headline="pck"),
        TaskKind(
            "zero-shot", "diffusers_repr.tasks.zero_shot:ZeroShotClassifier", settings=fits.zero_shot,
            headline="accuracy",
        ),
        TaskKind(
            "panoptic", "diffusers_repr.tasks.panoptic:OpenVocabularySegmenter", open_panoptic_images,
            pictures=pictures.of_panoptic, headline="pq",
        ),
        TaskKind(
            "representation", "diffusers_repr.tasks.representation:RepresentationProbe", open_attributed_images,
            pictures=pictures.of_representation, headline="linear", base=ENCODER,
        ),
    )
}  # fmt: skip


def register_task(
    name: str,
    *,
    open: Opener = open_labelled_images,
    settings: Callable[..., dict[str, Any]] | None = None,
    pictures: Drawer | None = None,
    headline: str | None = None,
    base: BaseKind = DENOISER,
) -> Callable[[type[Task]], type[Task]]:
    """Make a task of one's own known to recipes by a name.

    Args:
        name: What a recipe calls it.
        open: See `TaskKind`; images with labels if nothing is told.
        settings: See `TaskKind`.
        pictures: See `TaskKind`.
        headline: See `TaskKind`.
        base: See `TaskKind`.

    Raises:
        TypeError: For a class that is no `Task`.
        ValueError: If the name is taken.
    """

    def add(cls: type[Task]) -> type[Task]:
        if not (isinstance(cls, type) and issubclass(cls, Task)):
            raise TypeError(f"register_task takes a subclass of Task; got {cls!r}.")
        if name in _KINDS:
            raise ValueError(f"register_task({name!r}): there is one of this name. Choose another.")
        _KINDS[name] = TaskKind(name, cls, open, settings, pictures, headline, base)
        return cls

    return add


def unregister_task(name: str) -> None:
    """Forget a task."""
    del _KINDS[name]


def list_tasks() -> list[str]:
    """Names of the tasks, in order.

    Example:
        >>> list_tasks()[:2]
        ['classification', 'correspondence']
    """
    return sorted(_KINDS)


def task_kind(name: str) -> TaskKind:
    """The task of a name.

    Raises:
        ValueError: With the names there are.
    """
    if name not in _KINDS:
        raise ValueError(
            f"Unknown task {name!r}; expected one of {', '.join(list_tasks())}. `register_task` adds one of your own."
        )
    return _KINDS[name]


__all__ = ["TaskKind", "list_tasks", "register_task", "task_kind", "unregister_task"]
