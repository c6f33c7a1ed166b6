"""`LTXVideoTransformer3DModel`: LTX-Video (arXiv 2501.00103). Latents are tokens there, maps here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.families.video import VideoFamily
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.noise import NoiseLevel

_SIDES = ("num_frames", "height", "width")
# Seconds and pixels of a cell at the pipeline's 25 frames a second and the published autoencoder's strides.
_SCALE = (8 / 25, 32, 32)


@register_family("LTXVideoTransformer3DModel")
class LTXFamily(VideoFamily):
    """Self-attention over all frames, then the text, block by block; a token is one latent pixel."""

    batched = ("image_rotary_emb",)
    stacks = ("transformer_blocks",)

    def channels(self) -> int:
        """A token's.

        Raises:
            ValueError: For a config with larger patches, which the pipeline itself cannot call.
        """
        if self.config["patch_size"] != 1 or self.config["patch_size_t"] != 1:
            raise ValueError(
                f"patch_size={self.config['patch_size']}, patch_size_t={self.config['patch_size_t']}: LTX's pipeline "
                "counts positions in latent pixels, so only patches of 1 are known."
            )
        return int(self.config["in_channels"])

    def size(self) -> tuple[int, int]:
        """512 x 704 pixels: the config has no size, the pipeline takes 16 x 22 latent pixels."""
        return 16, 22

    def inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Tokens, and the size they have; the scale of positions is the condition's, which knows the frame rate."""
        timestep = self.timestep(level, x_t)
        sides = dict(zip(_SIDES, x_t.shape[2:], strict=True))
        scaled = {"rope_interpolation_scale": _SCALE, **condition}
        return {"hidden_states": _packed(x_t), "timestep": timestep, **scaled, **sides}

    def output(self, raw: Any, x_t: Tensor) -> Tensor:
        """Unpacked to `(B, C, f, h, w)`."""
        tokens = raw if isinstance(raw, Tensor) else raw[0]
        return tokens.transpose(1, 2).unflatten(2, x_t.shape[2:])

    def sample(self, inputs: Mapping[str, Any]) -> Tensor:
        """Unpacked to `(B, C, f, h, w)`, of the size that the call tells."""
        return inputs["hidden_states"].transpose(1, 2).unflatten(2, [inputs[name] for name in _SIDES])

    def with_sample(self, inputs: Mapping[str, Any], x_t: Tensor) -> dict[str, Any]:
        """Packed."""
        return {**inputs, "hidden_states": _packed(x_t)}

    def with_output(self, raw: Tensor, prediction: Tensor) -> Tensor:
        """Packed."""
        return _packed(prediction)

    def example(self, batch: int, device: str) -> dict[str, Any]:
        """128 text tokens and their mask."""
        return {
            "encoder_hidden_states": torch.zeros(batch, 128, self.config["caption_channels"], device=device),
            "encoder_attention_mask": torch.ones(batch, 128, device=device),
        }


def _packed(value: Tensor) -> Tensor:
    """`(B, C, f, h, w)` as tokens `(B, N, C)`."""
    return value.flatten(2).transpose(1, 2)
