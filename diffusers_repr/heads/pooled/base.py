"""What heads on a vector an image share: standardisation as part of the state."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from diffusers_repr.heads.base import Head
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import CastLinear
from diffusers_repr.models.outputs import ClassifierOutput, packed


class PooledHead(Head):
    """Base of heads on a vector an image: pooled features `(B, in_features)` to logits `(B, num_classes)` in float32.

    `mean` and `std` are buffers: features enter as `(x - mean) / std`, so a saved head holds its own preprocessing.
    A subclass takes `in_features` and `num_classes` first, registers its arguments with `register_to_config`, calls
    `make_statistics` and writes `classify`.

    Attributes:
        default_protocol: How it is fitted unless told otherwise; see `PROTOCOLS`.
        takes_steps: Whether protocols of gradient steps fit it.
    """

    default_protocol: ClassVar[str] = "adam"
    takes_steps: ClassVar[bool] = True

    mean: Tensor
    std: Tensor

    def make_statistics(self, in_features: int, num_classes: int) -> None:
        """Make the buffers `mean` (zeros) and `std` (ones).

        Raises:
            ValueError: If a size is not a whole number from 1.
        """
        check_sizes(in_features=in_features, num_classes=num_classes)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("std", torch.ones(in_features))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set what features are standardised by, both `(in_features,)`; a std of 0 becomes 1."""
        std = torch.where(std > 0, std, torch.ones_like(std))
        self.mean.copy_(mean)
        self.std.copy_(std)

    def standardize(self, features: Tensor) -> Tensor:
        """`(x - mean) / std` in float32.

        Raises:
            ValueError: If `features` is not `(B, in_features)`.
        """
        if features.ndim != 2 or features.shape[1] != self.mean.shape[0]:
            raise ValueError(
                f"{type(self).__name__} takes features (B, {self.mean.shape[0]}); got {tuple(features.shape)}."
                + (" Pool maps and tokens first." if features.ndim > 2 else "")
            )
        return (features.to(self.mean.device).float() - self.mean.float()) / self.std.float()

    def check_values(self) -> None:
        """Refuse a `std` that is not above 0."""
        if not self.std.is_meta and not bool((self.std > 0).all()):
            raise ValueError(f"The std of this {type(self).__name__} has values that are not above 0.")

    def linear_layers(self) -> list[nn.Linear]:
        """Its linear layers, the first and the last as features pass them; a head in another order writes its own."""
        return [module for module in self.modules() if isinstance(module, nn.Linear)]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights as `torch.nn.Linear` does, from `generator` (the global one if None).

        Raises:
            TypeError: If there are parameters outside of linear layers: such a head writes its own.
        """
        layers = self.linear_layers()
        if {id(p) for p in self.parameters()} != {id(p) for layer in layers for p in layer.parameters()}:
            raise TypeError(f"{type(self).__name__} has other layers than linear ones; write its reset_parameters.")
        for layer in layers:
            if not layer.weight.is_meta:
                init_linear(layer, generator)

    def classify(self, features: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of standardised features."""
        raise NotImplementedError

    def forward(self, features: Tensor, return_dict: bool | None = None) -> Tensor | ClassifierOutput | tuple[Tensor]:
        """Logits `(B, num_classes)`, float32 whatever the dtype of head and features.

        Args:
            features: `(B, in_features)`.
            return_dict: None for the logits themselves, True for an output with `logits`, False for a tuple.
        """
        with torch.autocast(features.device.type, enabled=False):
            logits = self.classify(self.standardize(features)).float()
        return packed(logits, ClassifierOutput, return_dict)


def init_linear(layer: nn.Linear, generator: torch.Generator | None = None) -> None:
    """Torch's own initialisation of a linear layer, U(-1/sqrt(in), 1/sqrt(in)), drawn from `generator`."""
    bound = layer.in_features**-0.5
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        if layer.bias is not None:
            layer.bias.uniform_(-bound, bound, generator=generator)


def empty_linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer of zeros, in the dtype of its input; draws no random number."""
    # Where modules are made now: of a config that is only checked, on the meta device.
    device = torch.get_default_device()
    layer = nn.utils.skip_init(CastLinear, in_features, out_features, bias=bias, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer


__all__ = ["PooledHead", "empty_linear", "init_linear"]
