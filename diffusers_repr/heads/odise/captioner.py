"""`ImplicitCaptioner`: what an image looks like to CLIP, in the place of a caption of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import CastLinear


class ImplicitCaptioner(nn.Module):
    """ODISE (Xu et al. 2023, arXiv 2303.04803), sec. 3.2: an image's vector to what is added to the empty prompt.

    `tanh(a) * (W v + P)` for the embedded text and, of the same form, for the embedded timestep. Both `a` start at 0:
    then nothing is added, and the features are bit for bit those of the empty prompt, whatever the vector.

    Args:
        vector_dim: Values of the image's vector.
        tokens: Of the embedded prompt.
        width: Of each token.
        time_width: Of the embedded timestep.

    Example:
        >>> context, shift = ImplicitCaptioner(4, 7, 8, 16)(torch.ones(2, 4))
        >>> context.shape, shift.shape, bool(context.any())
        (torch.Size([2, 7, 8]), torch.Size([2, 16]), False)
    """

    def __init__(self, vector_dim: int, tokens: int, width: int, time_width: int) -> None:
        super().__init__()
        check_sizes(vector_dim=vector_dim, tokens=tokens, width=width, time_width=time_width)
        self.text, self.time = CastLinear(vector_dim, width), CastLinear(vector_dim, time_width)
        self.text_position = nn.Parameter(torch.zeros(1, tokens, width))
        self.time_position = nn.Parameter(torch.zeros(1, time_width))
        for position in (self.text_position, self.time_position):
            nn.init.trunc_normal_(position, std=0.02)
        self.text_gate = nn.Parameter(torch.zeros(1, tokens, width))
        self.time_gate = nn.Parameter(torch.zeros(1, time_width))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors `(B, vector_dim)`, not normalised, to `(B, tokens, width)` and `(B, time_width)`."""
        text = torch.tanh(self.text_gate) * (self.text(vectors)[:, None] + self.text_position)
        return text, torch.tanh(self.time_gate) * (self.time(vectors) + self.time_position)


__all__ = ["ImplicitCaptioner"]
