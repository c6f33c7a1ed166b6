"""`JointViTModel`: HybViT and GenViT (arXiv 2208.07791)."""

from __future__ import annotations

from diffusers_repr.denoiser.attention_layouts import SELF
from diffusers_repr.denoiser.family import Grid, PatchTransformerFamily
from diffusers_repr.denoiser.family_registry import register_family


@register_family("JointViTModel")
class JointViTFamily(PatchTransformerFamily):
    """Takes no condition: its classes are an output. One class token stands before the image's tokens."""

    attentions = {"blocks.*.attn": SELF}
    not_image = (*PatchTransformerFamily.not_image, "classifier", "modulation")

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """With or without the class token."""
        found = super().grid(tokens, size)
        if found is not None:
            return found
        found = super().grid(tokens - 1, size)
        return None if found is None else (found[0], 1)
