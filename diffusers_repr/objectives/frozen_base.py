"""What objectives on a frozen base share: its part of the recipe, and how a card names it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, cast

import torch

from diffusers_repr.config.recipe import setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub import is_repo_id


@dataclasses.dataclass(frozen=True)
class FrozenBaseConfig:
    """The frozen base.

    Raises:
        ValueError: Without a base.
    """

    pretrained_model_name_or_path: str | None = setting(None, "pipeline folder or Hub id of the frozen base")
    revision: str | None = setting(None, "branch, tag or commit of the base on the Hub")
    base_dtype: Literal["float32", "float16", "bfloat16"] = setting("float32", "of the frozen base")

    def __post_init__(self) -> None:
        if self.pretrained_model_name_or_path is None:
            raise ValueError("No base; pass --pretrained_model_name_or_path, a pipeline folder or a Hub id.")

    def load_base(self) -> Denoiser:
        """The frozen base."""
        base = cast(str, self.pretrained_model_name_or_path)
        return Denoiser.from_pretrained(base, revision=self.revision, dtype=getattr(torch, self.base_dtype))

    @property
    def public_base(self) -> str | None:
        """The base as a card links it: its Hub id; None for a folder."""
        base = str(self.pretrained_model_name_or_path)
        return base if is_repo_id(base) and not Path(base).is_dir() else None


__all__ = ["FrozenBaseConfig"]
