"""The units of a U-Net on the way up, by which papers name their layers."""

from __future__ import annotations

from torch import nn


def decoder_units(model: nn.Module) -> list[list[str]]:
    """Stage by stage, each residual block: the path of its attention, or its own where there is none.

    Args:
        model: The network; one without `up_blocks` has no stage.
    """
    stages = []
    for i, block in enumerate(getattr(model, "up_blocks", None) or ()):
        attentions = dict(enumerate(getattr(block, "attentions", None) or ()))
        kinds = ["resnets" if attentions.get(j) is None else "attentions" for j in range(len(block.resnets))]
        stages.append([f"up_blocks.{i}.{kind}.{j}" for j, kind in enumerate(kinds)])
    return stages


__all__ = ["decoder_units"]
