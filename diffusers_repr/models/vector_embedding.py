"""`VectorEmbedding`: the way of a vector into a network that was not made for it, with a learned null vector."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput, packed


class VectorEmbedding(ReprModelMixin, ModelMixin, ConfigMixin):
    """Vectors `(B, D)` through a linear layer to what a network is conditioned on, a null vector for dropped ones.

    For a U-Net's time embedding (`class_embed_type="identity"`) `zero_init` makes the layer 0 at first, as RCG's code
    has it (Li et al. 2023, arXiv 2312.03701); for a context token of a text model it is not. The null vector is
    learned.

    Args:
        in_channels: D.
        out_channels: Of the network's input.
        zero_init: Whether weights and biases start at 0.

    Raises:
        ValueError: For sizes below 1.

    Example:
        >>> VectorEmbedding(3, 8, zero_init=True)(torch.ones(2, 3)).abs().max().item()
        0.0
    """

    _no_split_modules: list[str] = []

    @register_to_config
    def __init__(self, in_channels: int, out_channels: int, zero_init: bool = False) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, out_channels=out_channels)
        self.null = nn.Parameter(0.02 * torch.randn(in_channels))
        self.proj = nn.Linear(in_channels, out_channels)
        if zero_init:
            for parameter in self.proj.parameters():
                nn.init.zeros_(parameter)

    def forward(
        self, vectors: Tensor, drop_mask: Tensor | None = None, return_dict: bool | None = None
    ) -> Tensor | SampleOutput | tuple[Tensor]:
        """`(B, out_channels)`.

        Args:
            vectors: `(B, in_channels)`.
            drop_mask: `(B,)`, boolean: samples that get the null vector; None: no sample.
            return_dict: None for the tensor itself, True for an output with `sample`, False for a tuple.

        Raises:
            ValueError: For vectors of another width.
        """
        width = self.config["in_channels"]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(f"VectorEmbedding takes vectors (B, {width}); got {tuple(vectors.shape)}.")
        if drop_mask is None:
            drop_mask = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        # Always a choice, so that the null vector has a gradient in every step, as DDP wants.
        chosen = torch.where(drop_mask[:, None], self.null.to(vectors), vectors)
        return packed(self.proj(chosen), SampleOutput, return_dict)


__all__ = ["VectorEmbedding"]
