"""`UNet2DModel`: DDPM, DDIM, ADM-like and EDM networks, class-conditional too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.family import Family
from diffusers_repr.denoiser.family_registry import register_family


@register_family("UNet2DModel")
class UNet2DFamily(Family):
    """Pixel or latent U-Net without text; `class_labels` where `class_embed_type` or `num_class_embeds` is set."""

    conditioning = "class"
    joins = True

    def multiple(self) -> int:
        """Two to the number of down-samplings."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def joins_at(self, inputs: Mapping[str, Any], units: Collection[str]) -> bool:
        """Not where the output is divided by the timesteps of the batch that came in."""
        return self.config.get("time_embedding_type") != "fourier"

    def from_class_labels(self, labels: Tensor | None) -> dict[str, Any]:
        """Ids below `num_class_embeds`; the vectors of an `identity` embedding come through `embeddings=`."""
        count, kind = self.config.get("num_class_embeds"), self.config.get("class_embed_type")
        if count is None and kind is None:
            if labels is not None:
                raise ValueError("This UNet2DModel is unconditional (num_class_embeds is not set); drop class_labels.")
            return {}
        if labels is None:
            null = f"0 to {count - 1}" if count else f"class_embed_type={kind!r}"
            raise ValueError(
                f"This UNet2DModel is class-conditional ({null}) and its config does not tell a null class: pass "
                "class_labels= (the id trained as null, if there is one), or embeddings={'class_labels': vectors}."
            )
        if count is not None and bool(((labels < 0) | (labels >= count)).any()):
            raise ValueError(f"class_labels must lie in 0..{count - 1}; got {labels.tolist()}.")
        return {"class_labels": labels}

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """Labels 0, or zero vectors."""
        if self.config.get("class_embed_type") == "identity":
            return {"class_labels": torch.zeros(batch, 4 * self.config["block_out_channels"][0], device=device)}
        if self.config.get("num_class_embeds") is not None or self.config.get("class_embed_type") is not None:
            return {"class_labels": torch.zeros(batch, dtype=torch.long, device=device)}
        return {}
