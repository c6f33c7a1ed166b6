"""`DiTTransformer2DModel` (Peebles and Xie 2022, arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import SELF
from diffusers_repr.denoiser.family import BatchLanes, PatchTransformerFamily, equal_halves
from diffusers_repr.denoiser.family_registry import register_family


@register_family("DiTTransformer2DModel")
class DiTFamily(PatchTransformerFamily):
    """Class-conditional; the null class is id `num_embeds_ada_norm` (1000 for ImageNet)."""

    conditioning = "class"
    joins = True
    attentions = {"transformer_blocks.*.attn1": SELF}

    def square(self) -> bool:
        """Its forward un-patches by the square root of the token count."""
        return True

    def classes(self) -> tuple[int, int | None]:
        """`num_embeds_ada_norm`, and the id after them."""
        return int(self.config["num_embeds_ada_norm"]), int(self.config["num_embeds_ada_norm"])

    def from_class_labels(self, labels: Tensor | None) -> dict[str, Any]:
        """Ids 0 to `num_embeds_ada_norm`, the last being null; None gives null."""
        null = int(self.config["num_embeds_ada_norm"])
        if labels is None:
            return {"class_labels": torch.tensor([null])}
        if bool(((labels < 0) | (labels > null)).any()):
            raise ValueError(f"class_labels must lie in 0..{null} ({null} is the null class); got {labels.tolist()}.")
        return {"class_labels": labels}

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """The pipeline puts the condition first, and the null class in the second half."""
        labels, rows = inputs.get("class_labels"), inputs["hidden_states"].shape[0]
        half = rows // 2
        null = int(self.config["num_embeds_ada_norm"])
        if labels is None or pipe is None or rows % 2 or not bool((labels[half:] == null).all()):
            return BatchLanes(slice(0, rows))
        if not equal_halves(inputs["hidden_states"]):
            return BatchLanes(slice(0, rows))
        return BatchLanes(slice(0, half), slice(half, rows))

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """Label 0."""
        return {"class_labels": torch.zeros(batch, dtype=torch.long, device=device)}
