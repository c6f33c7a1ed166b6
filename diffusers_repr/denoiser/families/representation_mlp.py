"""`RepresentationMLPModel`: diffusion of vectors (RCG, arXiv 2312.03701)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.family import Family, Grid
from diffusers_repr.denoiser.family_registry import register_family


@register_family("RepresentationMLPModel")
class RepresentationMLPFamily(Family):
    """x_0 is a vector `(B, D)`, no image; with classes or without."""

    axes = 0
    conditioning = "class"

    def size(self) -> tuple[int, int]:
        """Vectors have none.

        Raises:
            ValueError: Always.
        """
        raise ValueError("A RepresentationMLPModel denoises vectors, which have no height and width.")

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """There is no image."""
        return None

    def is_image(self, path: str) -> bool:
        """No module carries one."""
        return False

    def classes(self) -> tuple[int, int | None]:
        """As the config says; without a null class the id is -1."""
        count = int(self.config.get("num_classes") or 0)
        return count, None if not count else count if self.config.get("null_class", True) else -1

    def from_class_labels(self, labels: Tensor | None) -> dict[str, Any]:
        """Ids, of a network with classes; None gives the null class."""
        count, null = self.classes()
        if not count:
            if labels is not None:
                raise ValueError("This RepresentationMLPModel has no classes (num_classes=0); drop class_labels.")
            return {}
        if labels is None:
            if null == -1:
                raise ValueError("This RepresentationMLPModel has no null class; give class_labels.")
            return {"class_labels": torch.tensor([null])}
        return {"class_labels": labels}

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """Label 0, of a network with classes."""
        if not self.classes()[0]:
            return {}
        return {"class_labels": torch.zeros(batch, dtype=torch.long, device=device)}
