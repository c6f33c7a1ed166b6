"""On which images a training script measures what it trains; and the word that takes such a setting back."""

from __future__ import annotations

import dataclasses
from typing import Any

from diffusers_repr.config.recipe import setting


def take_back(config: Any, *names: str) -> None:
    """Settings that a flag or recipe gives as the word `none` become None, as if nothing had named them.

    Args:
        config: A dataclass of settings, frozen or not.
        *names: Of its fields.
    """
    for name in names:
        if getattr(config, name) == "none":
            object.__setattr__(config, name, None)


@dataclasses.dataclass(frozen=True)
class MeasuredSplit:
    """What is measured; the field is a key of a recipe, in which the word `none` takes it back.

    Example:
        >>> MeasuredSplit("none").eval_split is MeasuredSplit().eval_split is None
        True
    """

    eval_split: str | None = setting(None, "split that the result is measured on; none: no measurement")

    def __post_init__(self) -> None:
        take_back(self, "eval_split")


__all__ = ["MeasuredSplit", "take_back"]
