"""`FiLM`: a code that scales, and shifts, the normalised activations of a U-Net's residual blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.mixin import ReprModelMixin

Modulation = Literal["scale", "scale_shift"]
MODULATIONS: tuple[Modulation, ...] = ("scale", "scale_shift")
# Path of a residual block -> (scale, shift), each `(B, C)`; no shift where it is 0.
ScalesAndShifts = dict[str, tuple[Tensor, Tensor | None]]


class FiLM(ReprModelMixin, ModelMixin, ConfigMixin):
    """A code z to a scale and a shift for every residual block: `(zs, zb) = Linear(SiLU(z))`, 0 at first.

    In a block `h = GN(h) (1 + ts) + tb` of the time becomes `h = (1 + zs) h + zb`. DiffAE (Preechakul et al. 2022,
    arXiv 2111.15640, eq. 7) scales alone; InfoDiffusion and PDAE shift too.

    Args:
        code_dim: D of the code.
        blocks: Path of each residual block -> its channels, as `film_blocks(unet)` finds them.
        modulation: `scale` or `scale_shift`.

    Raises:
        ValueError: Without blocks, for sizes below 1 and another modulation.

    Example:
        >>> film = FiLM(4, {"mid_block.resnets.0": 8}, "scale")
        >>> scale, shift = film(torch.ones(2, 4))["mid_block.resnets.0"]
        >>> tuple(scale.shape), scale.abs().max().item(), shift
        ((2, 8), 0.0, None)
    """

    _no_split_modules: list[str] = []

    @register_to_config
    def __init__(self, code_dim: int, blocks: Mapping[str, int], modulation: Modulation = "scale_shift") -> None:
        super().__init__()
        check_sizes(code_dim=code_dim, **{f"blocks[{path!r}]": width for path, width in blocks.items()})
        if not blocks or modulation not in MODULATIONS:
            raise ValueError(
                f"FiLM takes blocks, and a modulation of {', '.join(MODULATIONS)}; got {len(blocks)} blocks and "
                f"{modulation!r}."
            )
        blocks = dict(sorted(blocks.items()))  # the order in which a config is saved
        self.register_to_config(blocks=blocks)
        each = 2 if modulation == "scale_shift" else 1
        self.proj = nn.ModuleList(nn.Linear(code_dim, each * width) for width in blocks.values())
        for parameter in self.proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, code: Tensor) -> ScalesAndShifts:
        """Scale and shift of every block, by its path.

        Args:
            code: `(B, D)`.

        Raises:
            ValueError: For codes of another width.
        """
        width = self.config["code_dim"]
        if code.ndim != 2 or code.shape[1] != width:
            raise ValueError(f"This network is told codes (B, {width}); got {tuple(code.shape)}.")
        weight = next(self.proj.parameters())
        active = functional.silu(code.to(weight.dtype))
        made: ScalesAndShifts = {}
        for path, layer in zip(self.config["blocks"], self.proj, strict=True):
            if self.config["modulation"] == "scale":
                made[path] = layer(active), None
            else:
                scale, shift = layer(active).chunk(2, dim=1)
                made[path] = scale, shift
        return made


def film_blocks(unet: nn.Module, parts: Collection[str] | None = None) -> dict[str, int]:
    """The residual blocks of a U-Net that are told the time: path -> channels, in the order of its modules.

    Args:
        unet: A `UNet2DModel`, `UNet2DConditionModel`, or another network of diffusers' `ResnetBlock2D`s.
        parts: Names of its children in which they are looked for; None: all.

    Raises:
        ValueError: If there is none.
    """
    found = {
        path: int(block.norm2.num_channels)
        for path, block in unet.named_modules()
        if isinstance(block, ResnetBlock2D)
        and block.time_emb_proj is not None
        and (parts is None or path.split(".")[0] in parts)
    }
    if not found:
        kinds = sorted({type(block).__name__ for block in unet.modules() if "Resnet" in type(block).__name__})
        raise ValueError(
            f"{type(unet).__name__} has no residual block (ResnetBlock2D) that is told the time"
            f"{f'; it has {kinds}' if kinds else ''}. A code enters by those of a UNet2DModel or UNet2DConditionModel."
        )
    return found


def film_modules(unet: nn.Module, paths: Collection[str]) -> dict[str, tuple[nn.Module, Any]]:
    """Of each block the module whose output is rewritten, and the function `(output, scale, shift) -> output`.

    Where the time scales and shifts (`scale_shift`) it is the projection of the time; else the second norm.
    """
    made: dict[str, tuple[nn.Module, Any]] = {}
    for path in paths:
        block: Any = unet.get_submodule(path)
        told = block.time_embedding_norm == "scale_shift"
        made[path] = (block.time_emb_proj, film_time) if told else (block.norm2, film_norm)
    return made


def film_time(output: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """`(s, b)` of the time to those of both affine maps, one after the other: `(1 + zs)(1 + s) - 1, (1 + zs) b + zb`.

    Args:
        output: `(B, 2C)`: s and b.
        scale: zs, `(B, C)`.
        shift: zb, or None.
    """
    s, b = output.chunk(2, dim=1)
    scale = scale.to(output.dtype)
    s, b = s + scale * (1 + s), b + scale * b  # so written, 0 changes no bit
    return torch.cat([s, b if shift is None else b + shift.to(output.dtype)], dim=1)


def film_norm(output: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """`(1 + zs) h + zb`, of a map.

    Args:
        output: h, `(B, C, H, W)`.
        scale: zs, `(B, C)`.
        shift: zb, or None.
    """
    scaled = output + scale.to(output.dtype)[:, :, None, None] * output
    return scaled if shift is None else scaled + shift.to(output.dtype)[:, :, None, None]


__all__ = ["MODULATIONS", "FiLM", "Modulation", "ScalesAndShifts", "film_blocks", "film_modules"]
