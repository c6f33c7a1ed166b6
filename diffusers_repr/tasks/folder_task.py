"""`FolderTask`: a task that is a folder by its format: how it is saved, shared, scored and told of."""

from __future__ import annotations

import functools
import os
from typing import Any, ClassVar

from diffusers_repr.features.source import FeatureSource
from diffusers_repr.tasks import files
from diffusers_repr.tasks.formats import TaskFormat
from diffusers_repr.tasks.kept_source import keep_source
from diffusers_repr.tasks.recipe import Score
from diffusers_repr.tasks.task import Task


class FolderTask(Task):
    """What all tasks of this package share; a subclass names its format, fits, loads, predicts and measures.

    Attributes:
        FORMAT: Its files.
        source: Where features come from; None where the task reads the base by itself.
    """

    FORMAT: ClassVar[TaskFormat]

    source: FeatureSource | None = None

    def save_pretrained(self, folder: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write config and weights of the head, if there is one, the recipe and a model card, all or nothing.

        A source that is `Hyperfeatures` is written too.

        A base that is a folder elsewhere on this disk is written as the way to it from `folder`; no absolute place of
        this machine is. If it fails, nothing has changed, and the task can be saved to another place.

        Args:
            folder: A new or empty folder, or one with a task of this kind, which is replaced.
            title: Heading of the card; the folder's name if None.

        Raises:
            FileExistsError: If the folder holds something else.
            OSError: If the disk is full or the folder cannot be written.
        """
        files.save(self.FORMAT, self.head, self.recipe, folder, title, self.source)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base: str | None = None,
        base_revision: str | None = None,
        private: bool = False,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: `"user/name"`.
            base: Hub id to write as the base, where it was a folder.
            base_revision: Goes with `base`.
            private: Whether a repository made here is private.
            token: Hub token with the right to write.
            revision: Branch to push to.
            commit_message: First line of the commit.

        Returns:
            Address of the commit.

        Raises:
            HubError: If the Hub does not take it.
        """
        options: dict[str, Any] = {
            "private": private,
            "token": token,
            "revision": revision,
            "commit_message": commit_message,
        }
        return self._push(self.recipe, repo_id, base, base_revision, **options)

    def _push(
        self,
        recipe: Any,
        repo_id: str,
        base: str | None = None,
        base_revision: str | None = None,
        commit_message: str | None = None,
        **options: Any,
    ) -> str:
        recipe = recipe if base is None else recipe.with_base(base, base_revision)
        message = commit_message or f"Upload {self.FORMAT.noun} with diffusers-repr"
        keep = functools.partial(keep_source, self.source)
        return files.push(self.FORMAT, self.head, recipe, repo_id, keep, commit_message=message, **options)

    def record(self, score: Score) -> None:
        """Keep a score in the recipe; one of the same name, data set and split is replaced."""
        self.recipe = self.recipe.with_scores([score])

    def card(self, title: str) -> str:
        """The model card: how to use it, what it reads, how it was made and what was measured.

        Args:
            title: Heading; where it is a Hub id, the example loads it.
        """
        return self.FORMAT.card(self.recipe, type(self.head).__name__, title)


__all__ = ["FolderTask"]
