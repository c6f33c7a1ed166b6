"""`Projector`: hidden states of a denoiser to the width of an encoder's features; used in training alone."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.heads.base import Head, register_head
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.outputs import SampleOutput, packed

ProjectorKind = Literal["mlp", "conv"]
PROJECTOR_KINDS: tuple[ProjectorKind, ...] = ("mlp", "conv")


@register_head("projector")
class Projector(Head, ModelMixin, ConfigMixin):
    """Tokens `(B, N, in_dim)` to tokens `(B, N, out_dim)`.

    Args:
        in_dim: Channels of the hidden states, D.
        out_dim: Channels of the encoder's features.
        hidden_dim: Of the hidden layers of the MLP; REPA's 2048 (Yu et al. 2024, arXiv 2410.06940).
        kind: `mlp`: Linear, SiLU, Linear, SiLU, Linear on every token, if `num_layers` is 3. `conv`: one convolution
            over the token grid, so that a token is matched together with its neighbours (iREPA, arXiv 2512.10794).
        kernel_size: Side of the convolution, odd: 3 as iREPA's README says, zeros around the grid.
        encoder: A hash of the encoder whose features it was trained to meet; None: not known.
        num_layers: Linear layers of the MLP: 3 in REPA, 2 in SRA (arXiv 2505.02831), 1 is a linear map.

    Raises:
        ValueError: For a size that is no whole number from 1, an unknown kind or an even kernel.

    Example:
        >>> import torch
        >>> Projector(8, 5, hidden_dim=16)(torch.ones(2, 6, 8), (2, 3)).shape
        torch.Size([2, 6, 5])
    """

    @register_to_config
    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        hidden_dim: int = 2048,
        kind: ProjectorKind = "mlp",
        kernel_size: int = 3,
        encoder: str | None = None,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        check_sizes(
            in_dim=in_dim, out_dim=out_dim, hidden_dim=hidden_dim, kernel_size=kernel_size, num_layers=num_layers
        )
        if kind not in PROJECTOR_KINDS:
            raise ValueError(f"Projector kind {kind!r}; expected one of {', '.join(PROJECTOR_KINDS)}.")
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, so that the grid keeps its size; got {kernel_size}.")
        if kind == "conv":
            self.layers: nn.Module = nn.Conv2d(in_dim, out_dim, kernel_size, padding=kernel_size // 2)
            return
        widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        linear = [nn.Linear(*pair) for pair in pairwise(widths)]
        parts = [part for layer in linear for part in (nn.SiLU(), layer)]
        self.layers = nn.Sequential(*parts[1:])
        for layer in self.layers:
            if isinstance(layer, nn.Linear):  # as the layers of the transformer they hang on
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(
        self, tokens: Tensor, grid: tuple[int, int], return_dict: bool | None = None
    ) -> Tensor | SampleOutput | tuple[Tensor]:
        """Project tokens.

        Args:
            tokens: `(B, N, in_dim)`, row by row.
            grid: `(h, w)` with `h * w == N`.
            return_dict: None for the tokens themselves, True for an output with `sample`, False for a tuple.

        Returns:
            `(B, N, out_dim)`.

        Raises:
            ValueError: For another number of tokens or channels.
        """
        width = self.config["in_dim"]
        if tokens.ndim != 3 or tokens.shape[1] != grid[0] * grid[1] or tokens.shape[2] != width:
            raise ValueError(
                f"This Projector takes (B, {grid[0]} * {grid[1]}, {width}) for a grid of {grid}; got "
                f"{tuple(tokens.shape)}."
            )
        if self.config["kind"] == "mlp":
            projected = self.layers(tokens)
        else:
            projected = FeatureMap.from_map(self.layers(FeatureMap(tokens, grid).as_map())).tokens()
        return packed(projected, SampleOutput, return_dict)


__all__ = ["Projector", "ProjectorKind"]
