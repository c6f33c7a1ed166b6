"""The encoder half of a U-Net of diffusers, as networks of this package have it: down blocks and a middle block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block
from torch import nn


def check_down_blocks(
    channels: Sequence[int],
    kinds: Sequence[str],
    known: Sequence[str],
    head: int,
    groups: int,
    last_attends: bool,
    even: bool = False,
) -> None:
    """Refuse stages that diffusers could not build.

    Args:
        channels: Of each stage.
        kinds: Class of each stage's block.
        known: Classes to choose from.
        head: Channels of an attention head.
        groups: Of the norms.
        last_attends: Whether what follows the last stage attends.
        even: Whether channels must be even, for an embedding of sines and cosines.

    Raises:
        ValueError: Naming the stage.
    """
    if not channels or len(channels) != len(kinds):
        raise ValueError(
            f"block_out_channels and down_block_types tell one stage each; got {len(channels)} and {len(kinds)}."
        )
    for stage, (width, kind) in enumerate(zip(channels, kinds, strict=True)):
        if kind not in known:
            raise ValueError(f"Unknown down block {kind!r}; expected one of {', '.join(known)}.")
        attends = kind.startswith("Attn") or (last_attends and stage == len(kinds) - 1)
        if width % groups or (even and width % 2) or (attends and width % head):
            raise ValueError(
                f"block_out_channels[{stage}]={width} must be {'even and ' * even}a multiple of "
                f"norm_num_groups={groups}" + (f" and attention_head_dim={head}." if attends else ".")
            )


def encoder_half(
    channels: Sequence[int],
    kinds: Sequence[str],
    *,
    layers_per_block: int,
    attention_head_dim: int,
    groups: int,
    eps: float,
    dropout: float,
    middle_attends: bool,
    time_channels: int | None = None,
    time_scale_shift: str = "default",
) -> tuple[nn.ModuleList, UNetMidBlock2D]:
    """Down blocks, of which all but the last halve the image, and the middle block.

    Args:
        channels: As `check_down_blocks`.
        kinds: As `check_down_blocks`.
        layers_per_block: Residual blocks of a stage.
        attention_head_dim: Channels of an attention head.
        groups: Of the norms.
        eps: Of the norms.
        dropout: Of the residual blocks.
        middle_attends: Whether the middle block has attention.
        time_channels: Of the time embedding; None: the blocks take none.
        time_scale_shift: How it enters.
    """
    same: dict[str, Any] = {"resnet_eps": eps, "resnet_act_fn": "silu", "resnet_groups": groups, "dropout": dropout}
    same |= {"attention_head_dim": attention_head_dim, "resnet_time_scale_shift": time_scale_shift}
    down = nn.ModuleList(
        get_down_block(
            kind,
            num_layers=layers_per_block,
            in_channels=channels[max(stage - 1, 0)],
            out_channels=channels[stage],
            temb_channels=time_channels,
            add_downsample=stage < len(channels) - 1,
            downsample_padding=1,
            **same,
        )
        for stage, kind in enumerate(kinds)
    )
    middle = UNetMidBlock2D(
        in_channels=channels[-1], temb_channels=time_channels, attn_groups=groups, add_attention=middle_attends, **same
    )
    return down, middle


__all__ = ["check_down_blocks", "encoder_half"]
