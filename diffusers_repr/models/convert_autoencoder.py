"""A KL autoencoder by the names of latent diffusion's code (REPA-E, VA-VAE) to diffusers' `AutoencoderKL`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor

from diffusers_repr.models.checkpoint import block_numbers, check_weights, some_of

_FIXED = {
    "encoder.conv_in.weight": 4,
    "decoder.conv_out.weight": 4,
    "quant_conv.weight": 4,
    "post_quant_conv.weight": 4,
}
_PLACES = (
    (r"(en|de)coder\.mid\.block_([12])\.", lambda m: f"{m[1]}coder.mid_block.resnets.{int(m[2]) - 1}."),
    (r"(en|de)coder\.mid\.attn_1\.", lambda m: f"{m[1]}coder.mid_block.attentions.0."),
    (r"(en|de)coder\.norm_out\.", lambda m: f"{m[1]}coder.conv_norm_out."),
)
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.(block|attn|downsample|upsample)\.(.+)")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def convert_autoencoder(weights: Mapping[str, Tensor]) -> Any:
    """The autoencoder of a state dict; sizes are read from the shapes, norms have 32 groups.

    Args:
        weights: With `quant_conv` and `post_quant_conv`; the mean of the posterior is in the first half.

    Returns:
        An `AutoencoderKL` in eval mode that gives and takes latents as they are (`scaling_factor` 1).

    Raises:
        ValueError: For names that are missing or unknown, shapes that do not fit, and numbers that are not finite.
    """
    check_weights(weights, _FIXED)
    missing = [name for name in _FIXED if name not in weights]
    levels = block_numbers(weights, "encoder.down")
    if missing or not levels:
        raise ValueError(
            f"This is no autoencoder of latent diffusion: it lacks {some_of(missing or ['encoder.down'])}. It holds "
            f"{some_of(weights, 4)}."
        )
    count = max(levels) + 1
    renamed = {}
    for key, value in weights.items():
        name = _renamed(key, count)
        attention = ".attentions." in name and value.ndim == 4  # their 1 x 1 convolutions are linear layers here
        renamed[name] = value[:, :, 0, 0].clone() if attention else value
    with init_empty_weights(include_buffers=False):
        model = AutoencoderKL(**_config(weights, count))
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    wrong = sorted(
        n for n in wanted.keys() | renamed.keys() if getattr(renamed.get(n), "shape", None) != wanted.get(n)
    )
    if wrong:
        raise ValueError(
            f"This is not quite an autoencoder of latent diffusion: {some_of(wrong)} (by diffusers' names) are "
            "missing, unknown or of another shape."
        )
    model.load_state_dict(renamed, assign=True)
    return model.eval()


def _config(weights: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    def kinds(side: str, stack: str) -> tuple[str, ...]:
        down = side == "encoder"
        numbers = range(count) if down else reversed(range(count))
        plain = "DownEncoderBlock2D" if down else "UpDecoderBlock2D"
        return tuple(f"Attn{plain}" if f"{side}.{stack}.{at}.attn.0.q.weight" in weights else plain for at in numbers)

    widths = tuple(_size(weights, f"encoder.down.{at}.block.0.conv1.weight") for at in range(count))
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "latent_channels": weights["post_quant_conv.weight"].shape[1],
        "block_out_channels": widths,
        "down_block_types": kinds("encoder", "down"),
        "up_block_types": kinds("decoder", "up"),
        "layers_per_block": len(set(block_numbers(_below(weights, "encoder.down.0."), "block"))) or 1,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "scaling_factor": 1.0,
    }


def _below(weights: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in weights if key.startswith(prefix)]


def _size(weights: Mapping[str, Tensor], name: str) -> int:
    value = weights.get(name, torch.empty(0))
    if value.ndim != 4 or value.shape[0] % 32:
        raise ValueError(f"The autoencoder's {name} must be a convolution to a multiple of 32 channels.")
    return value.shape[0]


def _renamed(key: str, count: int) -> str:
    """The name in diffusers of a tensor of an autoencoder of `count` levels."""
    if match := _LEVEL.fullmatch(key):
        down = match[1] == "encoder.down"
        at = int(match[2]) if down else count - 1 - int(match[2])
        kind = {"block": "resnets", "attn": "attentions", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}
        key = f"{'encoder.down_blocks' if down else 'decoder.up_blocks'}.{at}.{kind[match[3]]}.{match[4]}"
    for pattern, replacement in _PLACES:
        key = re.sub(f"^{pattern}", replacement, key)
    key = key.replace(".nin_shortcut.", ".conv_shortcut.")
    if match := re.fullmatch(r"(.+\.attentions\.\d+)\.(\w+)\.(weight|bias)", key):
        return f"{match[1]}.{_ATTENTION.get(match[2], match[2])}.{match[3]}"
    return key


__all__ = ["convert_autoencoder"]
