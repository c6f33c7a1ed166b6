"""Which layers each method acts on where a family names none: rules on the module tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

Method = Literal["pag", "sag", "repa", "readout", "depth_strong", "depth_weak", "segmentation"]
METHODS: tuple[str, ...] = get_args(Method)

# Stacks of transformer blocks by the names that diffusers gives them, in the order in which they run.
STACKS = ("blocks", "transformer_blocks", "joint_transformer_blocks", "single_transformer_blocks", "layers")
# Depth of a transformer -> number of the block, from 1, that REPA aligns: S and B, L, XL.
REPA_DEPTHS = {12: 4, 24: 8, 28: 8}
_STRONG, _WEAK = (2, 4, 5, 6, 7), 6  # decoder blocks of Depth-Aware Guidance, counted from 0
_HALF = "half of the depth; no published default (ours)"
_SECOND_HALF = "every block of the second half; no published choice (ours)"


@dataclass(frozen=True)
class LayerDefault:
    """Default layers of a method for one network.

    Attributes:
        layers: Full module paths; in a family's `layer_defaults` whole-path shell patterns too.
        source: Where the choice comes from.
    """

    layers: tuple[str, ...]
    source: str


SECOND_BLOCK = LayerDefault(("transformer_blocks.1.*",), "transformer_blocks.1, diffusers' default (blocks.1)")


def middle_attention(attentions: Sequence[str]) -> LayerDefault:
    """The self-attention at half of the depth, for PAG and SAG; none of none."""
    return LayerDefault(tuple(attentions[len(attentions) // 2 :][:1]), _HALF)


def repa_block(stack: Sequence[str]) -> LayerDefault:
    """The block that REPA aligns in a transformer of this depth.

    Block 8 of 28 and of 24, block 4 of 12, counted from 1 (arXiv 2410.06940: XL, L and B; S is taken as B); about a
    third of other depths.

    Example:
        >>> repa_block([f"blocks.{at}" for at in range(12)]).layers
        ('blocks.3',)
    """
    number = REPA_DEPTHS.get(len(stack), max(1, round(len(stack) / 3)))
    source = "the paper's depth" if len(stack) in REPA_DEPTHS else "a third of the depth; no published default (ours)"
    return LayerDefault((stack[number - 1],), source)


def decoder_resnets(model: nn.Module) -> list[str]:
    """Residual blocks of a U-Net's decoder, in execution order; none of other networks."""
    return [
        f"up_blocks.{i}.resnets.{j}"
        for i, stage in enumerate(getattr(model, "up_blocks", ()))
        for j, block in enumerate(getattr(stage, "resnets", ()))
        if hasattr(block, "conv2")
    ]


def readout_default(resnets: Sequence[str], blocks: Sequence[str]) -> LayerDefault:
    """Layers of a readout head.

    U-Nets: the residual branch of every up-block's residual block, `up_blocks.i.resnets.j.conv2`, before the shortcut
    is added (Luo et al. 2024, Readout Guidance; 12 maps for Stable Diffusion 1). Transformers: every block of the
    second half.
    """
    if resnets:
        return LayerDefault(tuple(f"{path}.conv2" for path in resnets), "Readout Guidance, Luo et al. 2024")
    return LayerDefault(tuple(blocks[len(blocks) // 2 :]), _SECOND_HALF)


def depth_default(resnets: Sequence[str], blocks: Sequence[str]) -> tuple[LayerDefault, LayerDefault]:
    """Layers of the strong and of the weak depth head (Kim et al. 2022, Depth-Aware Guidance).

    U-Nets: decoder blocks 2, 4, 5, 6, 7 and 6, counted from 0 over `up_blocks.i.resnets.j`; where there are fewer
    than eight, all but the first, and the one before the last. Transformers: as `readout_default`, and its middle one.
    """
    if not resnets:
        strong = tuple(blocks[len(blocks) // 2 :])
        return LayerDefault(strong, _SECOND_HALF), LayerDefault((strong[len(strong) // 2],), _SECOND_HALF)
    if len(resnets) > max(_STRONG):
        source = "Depth-Aware Guidance, Kim et al. 2022"
        return LayerDefault(tuple(resnets[at] for at in _STRONG), source), LayerDefault((resnets[_WEAK],), source)
    source = "all but the first, and the one before the last: fewer decoder blocks than the paper's (ours)"
    weak = resnets[-2] if len(resnets) > 1 else resnets[-1]
    return LayerDefault(tuple(resnets[1:] or resnets), source), LayerDefault((weak,), source)


def segmentation_default(resnets: Sequence[str], blocks: Sequence[str]) -> LayerDefault:
    """Layers of which pixels are classified, where there is no preset of the paper's (DDPM-Seg, arXiv 2112.03126).

    U-Nets: the last residual block of every decoder stage. DDPM-Seg takes five blocks between the coarsest and the
    finest stage of its 256 px network, which is the preset `ddpm-seg`. Transformers: the blocks at a half, two thirds
    and five sixths of the depth.
    """
    if resnets:
        last = {path.split(".")[1]: path for path in resnets}
        return LayerDefault(tuple(last.values()), "the last residual block of every decoder stage (ours)")
    places = dict.fromkeys(len(blocks) * sixths // 6 for sixths in (3, 4, 5))
    return LayerDefault(tuple(blocks[at] for at in places), "blocks at 1/2, 2/3 and 5/6 of the depth (ours)")


__all__ = [
    "METHODS",
    "REPA_DEPTHS",
    "SECOND_BLOCK",
    "STACKS",
    "LayerDefault",
    "Method",
    "decoder_resnets",
    "depth_default",
    "middle_attention",
    "readout_default",
    "repa_block",
    "segmentation_default",
]
