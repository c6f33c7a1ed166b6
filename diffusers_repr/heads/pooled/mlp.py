"""A multilayer perceptron on standardised features."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.pooled.base import PooledHead, empty_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


@register_head("mlp")
class MLPHead(PooledHead, ModelMixin, ConfigMixin):
    """Linear layers with an activation between them.

    Args:
        in_features: D, values of a pooled feature.
        num_classes: K.
        hidden_features: Width of each hidden layer, first to last.
        activation: `gelu`, `relu` or `silu`.

    Weights start as those of `torch.nn.Linear`, drawn from the global generator; `reset_parameters` takes another.

    Example:
        >>> import torch
        >>> MLPHead(8, 3, hidden_features=[16])(torch.ones(2, 8)).shape
        torch.Size([2, 3])
    """

    @register_to_config
    def __init__(
        self, in_features: int, num_classes: int, hidden_features: Sequence[int] = (256,), activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.make_statistics(in_features, num_classes)
        widths = list(hidden_features)
        if not widths or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths):
            raise ValueError(
                f"hidden_features must be whole numbers from 1, at least one; got {hidden_features!r}. "
                "Without a hidden layer use LinearHead."
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"Unknown activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}.")
        sizes = [in_features, *widths, num_classes]
        self.layers = nn.ModuleList(empty_linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.activation = ACTIVATIONS[activation]
        self.reset_parameters()

    def classify(self, features: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of standardised features."""
        *hidden, last = self.layers
        for layer in hidden:
            features = self.activation(layer(features))
        return last(features)
