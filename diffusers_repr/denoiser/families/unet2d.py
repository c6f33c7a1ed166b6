"""`UNet2DModel`: DDPM, DDIM, ADM-like and EDM networks, class-conditional too."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.default_layers import LayerDefault, Method
from diffusers_repr.denoiser.family import BatchLanes, Family
from diffusers_repr.denoiser.family_registry import register_family

# Stages return (hidden_states, residuals).
UNET_BLOCKS = dict.fromkeys(
    (
        "DownBlock2D",
        "AttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "ResnetDownsampleBlock2D",
        "SkipDownBlock2D",
        "AttnSkipDownBlock2D",
        "KDownBlock2D",
        "KCrossAttnDownBlock2D",
        "SkipUpBlock2D",
        "AttnSkipUpBlock2D",
    ),
    0,
)
UNET_DEFAULTS: dict[Method, LayerDefault] = {
    "pag": LayerDefault(("mid_block.*",), "middle block: the paper's Stable Diffusion setting and diffusers' default"),
    "sag": LayerDefault(("mid_block.*",), "middle block: diffusers' Stable Diffusion SAG pipeline"),
}
_ADM = {
    "pag": tuple(f"down_blocks.{at}" for at in ("4.attentions.1", "5.attentions.0", "5.attentions.1")),
    "sag": ("up_blocks.0.attentions.2",),
}


@register_family("UNet2DModel")
class UNet2DFamily(Family):
    """Pixel or latent U-Net without text; `class_labels` where `class_embed_type` or `num_class_embeds` is set."""

    conditioning = "class"
    joins = True
    block_outputs = UNET_BLOCKS
    layer_defaults = UNET_DEFAULTS

    def default_layers(self, method: Method, model: nn.Module) -> LayerDefault:
        """Those of the ADM code for PAG and SAG in a network of its six stages."""
        adm, attentions = _ADM.get(method), self.self_attentions(model)
        if adm is None or len(self.config.get("block_out_channels", ())) != 6 or not {*adm} <= {*attentions}:
            return super().default_layers(method, model)
        middle = tuple(path for path in attentions if path.startswith("mid_block") and method == "pag")
        return LayerDefault((*adm, *middle), "ImageNet 256 configuration of the paper's code")

    def sag_blur(self) -> tuple[float, int, str]:
        """By the size of x_0, where the config tells it."""
        if self.config.get("sample_size") is None:
            return super().sag_blur()
        shorter = min(self.size())
        if shorter >= 256:
            return 9.0, 31, "ImageNet 256 configuration of the paper's code"
        if shorter >= 128:
            return 3.0, 31, "ImageNet 128 configuration of the paper's code"
        return 1.0, 9, "as for latents; no published default for small images (ours)"

    def classes(self) -> tuple[int, int | None]:
        """`num_class_embeds`; it does not tell which of them is null, if any is."""
        return int(self.config.get("num_class_embeds") or 0), None

    def vector_input(self) -> str | None:
        """`class_labels`, which an `identity` embedding adds to that of the time."""
        return "class_labels" if self.config.get("class_embed_type") == "identity" else None

    def map_channels(self) -> int:
        """What the input has more channels than the output, in a network that is told a class as well."""
        told = self.config.get("num_class_embeds") or self.config.get("class_embed_type") == "identity"
        extra = int(self.config["in_channels"]) - int(self.config.get("out_channels") or 0)
        return max(0, extra) if told else 0

    def lanes(self, pipe: Any, inputs: Mapping[str, Any]) -> BatchLanes:
        """See `Family`; the maps behind x_t differ between the two halves."""
        return super().lanes(pipe, {**inputs, self.sample_name: self.sample(inputs)})

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
