"""One linear layer on standardised features: the probe of most papers."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.heads.base import Head, empty_linear, init_linear


class LinearHead(Head):
    """`W (x - mean) / std + b`. Weights start at zero; `fit_head` sets them.

    Args:
        in_features: D, values of a pooled feature.
        num_classes: K.
        bias: Whether there is a `b`.

    Example:
        >>> LinearHead(8, 3)(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """

    @register_to_config
    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.make_statistics(in_features, num_classes)
        self.linear = empty_linear(in_features, num_classes, bias)

    @property
    def input_layer(self) -> nn.Linear:
        """The layer that standardised features enter."""
        return self.linear

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights as `torch.nn.Linear` does, from `generator` (the global one if None)."""
        init_linear(self.linear, generator)

    def classify(self, features: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of standardised features."""
        return self.linear(features)
