"""The conditions of a pipeline's training, kept in its folder: what it draws from where a call is given none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_repr.denoiser.prior import FILE, Prior, load_prior


class StoredPriorMixin:
    """Of a pipeline: the prior that lies in its folder."""

    _stored_prior: Prior | None = None

    @property
    def stored_prior(self: Any) -> Prior | None:
        """What draws conditions where a call is given none: `prior.json` of the folder it was loaded from; may be set.

        Saved with the pipeline. None: there is none, and each class has its own default.
        """
        place = self.config.get("_name_or_path")
        if self._stored_prior is None and place and Path(place, FILE).is_file():
            self._stored_prior = load_prior(place)
        return self._stored_prior

    @stored_prior.setter
    def stored_prior(self, prior: Prior | None) -> None:
        """Another one."""
        self._stored_prior = prior

    def drawing(self, prior: Prior | None, *given: Any) -> Prior | None:
        """The prior of a call: the one it was given, or the stored one where no condition was given."""
        return self.stored_prior if prior is None and all(value is None for value in given) else prior

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers', with the stored prior.

        Args:
            save_directory: The folder.
            *args: As in diffusers.
            **kwargs: As in diffusers.
        """
        prior = self.stored_prior
        saver: Any = super()
        saver.save_pretrained(save_directory, *args, **kwargs)
        if prior is not None:
            prior.save_pretrained(save_directory)


__all__ = ["StoredPriorMixin"]
