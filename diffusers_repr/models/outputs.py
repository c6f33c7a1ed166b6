"""What networks and heads give with `return_dict=True`, and how it is packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor


@dataclass
class ClassifierOutput(BaseOutput):
    """What a classifier gives.

    Attributes:
        logits: Of the classes, `(B, K)`; of an ensemble of classifiers of pixels `(B, E, K, H, W)`.
    """

    logits: Tensor


@dataclass
class SampleOutput(BaseOutput):
    """What a network on maps or tokens gives.

    Attributes:
        sample: `(B, out, H, W)`, or tokens `(B, N, out)`.
    """

    sample: Tensor


def packed(value: Tensor, output: type[BaseOutput], return_dict: bool | None) -> Any:
    """A prediction in the form asked for.

    Args:
        value: The prediction.
        output: Class of one field.
        return_dict: None: the tensor itself; True: an output; False: a tuple, as diffusers' models have it.

    Example:
        >>> import torch
        >>> packed(torch.ones(1), SampleOutput, True).sample, packed(torch.ones(1), SampleOutput, False)
        (tensor([1.]), (tensor([1.]),))
    """
    if return_dict is None:
        return value
    return output(value) if return_dict else (value,)


__all__ = ["ClassifierOutput", "SampleOutput", "packed"]
