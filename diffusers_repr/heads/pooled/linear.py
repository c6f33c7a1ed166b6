"""One linear layer on standardised features: the probe of most papers."""

from __future__ import annotations

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.pooled.base import PooledHead, empty_linear


@register_head("linear")
class LinearHead(PooledHead, ModelMixin, ConfigMixin):
    """`W (x - mean) / std + b`. Weights start at zero; `fit_head` sets them.

    Args:
        in_features: D, values of a pooled feature.
        num_classes: K.
        bias: Whether there is a `b`.

    Example:
        >>> import torch
        >>> LinearHead(8, 3)(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """

    default_protocol = "lbfgs"

    @register_to_config
    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.make_statistics(in_features, num_classes)
        self.linear = empty_linear(in_features, num_classes, bias)

    def classify(self, features: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of standardised features."""
        return self.linear(features)
