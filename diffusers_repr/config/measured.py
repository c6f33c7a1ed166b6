"""`MeasuredSplit`: on which images a training script measures what it trains."""

from __future__ import annotations

import dataclasses

from diffusers_repr.config.recipe import setting


@dataclasses.dataclass(frozen=True)
class MeasuredSplit:
    """What is measured; the field is a key of a recipe, in which the word `none` takes it back.

    Example:
        >>> MeasuredSplit("none").eval_split is MeasuredSplit().eval_split is None
        True
    """

    eval_split: str | None = setting(None, "split that the result is measured on; none: no measurement")

    def __post_init__(self) -> None:
        object.__setattr__(self, "eval_split", None if self.eval_split == "none" else self.eval_split)


__all__ = ["MeasuredSplit"]
