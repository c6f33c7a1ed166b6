"""Default layers of transformers: which blocks the papers read, by depth."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffusers_repr.denoiser import Denoiser

# Depth of a transformer -> number of the block, from 1, that REPA aligns: S and B, L, XL.
REPA_DEPTHS = {12: 4, 24: 8, 28: 8}
BLOCK_STACKS = ("blocks", "transformer_blocks", "joint_transformer_blocks", "layers")


def block_stack(model: nn.Module) -> tuple[str, int]:
    """Name and length of a transformer's stack of blocks.

    Raises:
        ValueError: If it has none.
    """
    inner: Any = getattr(model, "_orig_mod", model)
    for name in BLOCK_STACKS:
        stack = getattr(inner, name, None)
        if isinstance(stack, nn.ModuleList):
            return name, len(stack)
    raise ValueError(
        f"{type(inner).__name__} has no stack of transformer blocks; name the layer. `list_layers(denoiser)` shows "
        "all."
    )


def block_path(model: nn.Module, number: int) -> str:
    """Path of the block with this number, counted from 1."""
    return f"{block_stack(model)[0]}.{number - 1}"


def block_number(model: nn.Module, path: str) -> int | None:
    """Number, from 0, of the block that the module at `path` is or is in; None of one outside of the blocks."""
    name, _, rest = path.partition(".")
    return int(rest.split(".")[0]) if rest and name == block_stack(model)[0] else None


def repa_layer(denoiser: Denoiser) -> str:
    """The layer that REPA aligns in a transformer of this depth.

    Block 8 of 28 and of 24, block 4 of 12, counted from 1 (arXiv 2410.06940: XL, L and B; S is taken as B); about a
    third of other depths.

    Raises:
        ValueError: If the network is no stack of transformer blocks.

    Example:
        >>> from diffusers_repr.models import SiTTransformer2DModel
        >>> from diffusers_repr.noise import NoiseSchedule
        >>> model = SiTTransformer2DModel(8, num_layers=12, hidden_size=8, num_attention_heads=2)
        >>> repa_layer(Denoiser(model, schedule=NoiseSchedule("flow", "velocity")))
        'blocks.3'
    """
    return block_path(denoiser.model, repa_depth(denoiser.model))


def repa_depth(model: nn.Module) -> int:
    """Number, from 1, of the block of `repa_layer`."""
    depth = block_stack(model)[1]
    return REPA_DEPTHS.get(depth, max(1, round(depth / 3)))


__all__ = ["REPA_DEPTHS", "block_number", "block_path", "block_stack", "repa_depth", "repa_layer"]
