"""`SiTTransformer2DModel`: SiT (arXiv 2401.08740), REPA (arXiv 2410.06940), and DiT checkpoints in its form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.attention_layouts import SELF, SELF_PROCESSORS, ProcessorRule
from diffusers_repr.denoiser.family import (
    BatchLanes,
    PatchTransformerFamily,
    equal_halves,
    null_first,
)
from diffusers_repr.denoiser.family_registry import register_family

_PROCESSORS = {"SiTAttnProcessor": ProcessorRule(spatial_norm=False, fused=True)}


@register_family("SiTTransformer2DModel")
class SiTFamily(PatchTransformerFamily):
    """Class-conditional, with `num_classes` as the null class, or without labels; vectors come by `embeddings=`."""

    conditioning = "class"
    joins = True
    attentions = {"blocks.*.attn": replace(SELF, processors={**SELF_PROCESSORS, **_PROCESSORS})}
    not_image = (*PatchTransformerFamily.not_image, "label_embed", "condition_embed", "modulation")

    def vector_input(self) -> str | None:
        """`condition`, of a network with `condition_dim`."""
        return "condition" if self.config.get("condition_dim") else None

    def from_class_labels(self, labels: Tensor | None) -> dict[str, Any]:
        """Ids 0 to `num_classes`, the last being null; None gives null. Nothing for a network without classes."""
        null = int(self.config["num_classes"])
        if not null:
            if labels is not None:
                raise ValueError("This network has no classes (num_classes=0); drop class_labels.")
            return {}
        if labels is None:
            return {"class_labels": torch.tensor([null])}
        if bool(((labels < 0) | (labels > null)).any()):
            raise ValueError(f"class_labels must lie in 0..{null} ({null} is the null class); got {labels.tolist()}.")
        return {"class_labels": labels}

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """As the pipeline tells (`SiTPipeline`: null first); else the half whose labels are all null is the null's."""
        labels, rows = inputs.get("class_labels"), inputs["hidden_states"].shape[0]
        guided = getattr(pipe, "do_classifier_free_guidance", None) is not None
        if pipe is None or guided or labels is None:
            return super().lanes(pipe, inputs)
        half, null = rows // 2, int(self.config["num_classes"])
        first, second = (bool((part == null).all()) for part in (labels[:half], labels[half:]))
        if rows % 2 or first == second or not equal_halves(inputs["hidden_states"]):
            return BatchLanes(slice(0, rows))
        return null_first(rows) if first else BatchLanes(slice(0, half), slice(half, rows))

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """Label 0, and zeros where the network takes a vector."""
        given: dict[str, Any] = {}
        if self.config["num_classes"]:
            given["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
        if self.config.get("condition_dim"):
            given["condition"] = torch.zeros(batch, self.config["condition_dim"], device=device)
        return given
