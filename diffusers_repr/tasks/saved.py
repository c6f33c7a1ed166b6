"""`SavedTask`: a task that reads features by a source, and how it is loaded."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Self

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.source import FeatureSource
from diffusers_repr.heads import Head
from diffusers_repr.tasks import files
from diffusers_repr.tasks.folder_task import FolderTask
from diffusers_repr.tasks.reading import check_source
from diffusers_repr.tasks.recipe import FeatureRecipe


class SavedTask(FolderTask):
    """What tasks that read features share; a subclass names its format, fits, predicts and measures.

    Args:
        head: The fitted head; None where nothing is fitted.
        recipe: Everything between an image and the head.
        denoiser: The base model.
        batch_size: Images read at a time.
        source: Where features come from, if not from a `FeatureExtractor` with the recipe's settings.

    Attributes:
        BATCH_SIZE: What `from_pretrained` reads at a time, if nothing is said.

    Raises:
        ValueError: If the recipe does not hold its source and none is given, or one with other layers.
    """

    BATCH_SIZE: ClassVar[int] = 64

    source: FeatureSource

    def __init__(
        self,
        head: Head | None,
        recipe: FeatureRecipe,
        denoiser: Denoiser,
        batch_size: int,
        source: FeatureSource | None = None,
    ) -> None:
        super().__init__(head, recipe, denoiser, batch_size)
        check_source(recipe, source)
        self.source = recipe.extractor(denoiser, batch_size=batch_size) if source is None else source

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        base: Any = None,
        revision: str | None = None,
        *,
        source: FeatureSource | None = None,
        base_revision: str | None = None,
        token: str | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a task and its base model.

        Args:
            id_or_folder: What `save_pretrained` wrote, or a Hub id.
            base: A folder, Hub id, pipeline or `Denoiser` to take instead of the recorded base at its recorded
                revision.
            revision: Of the task: branch, tag or commit.
            source: Where features come from, for a task that was fitted on a source of another class than
                `FeatureExtractor` and `Hyperfeatures`; its base is then the task's.
            base_revision: Of `base`.
            token: Hub token, for the task and the base.
            batch_size: Images read at a time, and rows of one forward (ensemble members and levels counted).
            **kwargs: For loading the base (`dtype`, `variant`, ...).

        Raises:
            FileNotFoundError: If there is no such folder, task or base folder.
            ValueError: If a file is damaged, the base is another model than the task was fitted on, or a source is
                missing or another one.
            OSError: If the Hub does not give the task or the base.
        """
        if token is not None:
            kwargs["token"] = token
        base = source.denoiser if source is not None and base is None else base
        head, recipe, denoiser = files.load(cls.FORMAT, id_or_folder, base, revision, base_revision, token, kwargs)
        size = batch_size or cls.BATCH_SIZE
        if source is None:
            source = files.load_source(cls.FORMAT, id_or_folder, revision, token, recipe, denoiser, size)
        return cls._joined(head, recipe, denoiser, size, source)

    @classmethod
    def _joined(
        cls, head: Any, recipe: Any, denoiser: Denoiser, batch_size: int, source: FeatureSource | None
    ) -> Self:
        """A task of its parts."""
        return cls(head, recipe, denoiser, batch_size, source)


__all__ = ["SavedTask"]
