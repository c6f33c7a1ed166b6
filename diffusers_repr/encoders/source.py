"""Where an encoder's features come from: the part of an `Encoder` that differs between networks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

POOLINGS = (None, "cls", "mean")


class Source:
    """A network that gives a vector a patch. Subclass for another kind of network.

    Attributes:
        module: The network.
        channels: Of the images it takes.
        dim: Channels of its tokens, D.
        mean: Of pixels in [0, 1], one number or one a channel.
        std: As `mean`.
        image_size: (H, W) that images are resized to; None leaves it to `size`.
    """

    module: nn.Module
    channels: int
    dim: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int] | None = None

    @property
    def num_blocks(self) -> int | None:
        """Blocks whose attention `recording_attention` gives; None where that is not known."""
        return None

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) that images of `size` (H, W) are resized to."""
        raise NotImplementedError

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of resized images of `size` (H, W)."""
        raise NotImplementedError

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Global features `(B, D)`, tokens `(B, N, D)` and grid (h, w) of preprocessed pixels."""
        raise NotImplementedError

    def read_with_gradient(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """As `read`, as a graph of the network's parameters; the network is in the mode that it is in."""
        return self.read(pixels)

    def with_module(self, module: nn.Module) -> Source:
        """The same reading of another network of the same class, which is not copied."""
        made = copy.copy(self)
        made.module = module
        return made

    def untrained(self, seed: int) -> Source:
        """The same reading of the network with the random weights that it starts training from.

        Args:
            seed: Of the weights; torch's global random state is left alone.

        Raises:
            TypeError: For a network that cannot be made anew.
        """
        return self.with_module(fresh_module(self.module, seed))

    def recording_attention(self, layers: Sequence[int]) -> AbstractContextManager[list[Tensor]]:
        """A context whose list holds at its end the attention `(B, heads, N, N)` of blocks, over patch tokens.

        Raises:
            TypeError: If the network's attention is not known.
        """
        raise TypeError(
            f"The attention of {type(self.module).__name__} is not known; only encoders of `from_pretrained` give it."
        )

    def describe(self) -> dict[str, Any]:
        """What else decides the features, for the fingerprint: values that JSON holds."""
        return {}


def fresh_module(module: nn.Module, seed: int, **arguments: Any) -> nn.Module:
    """A network of the same architecture with random weights, in eval mode, on its device.

    From its config where it has one; else part by part, each from its own config or by its `reset_parameters`.

    Args:
        module: The network.
        seed: Of the weights.
        **arguments: Of the class of a network of transformers, beside its config.

    Raises:
        TypeError: If some parameters belong to a part that draws none again.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        if isinstance(module, PreTrainedModel):
            fresh: nn.Module = type(module)(copy.deepcopy(module.config), **arguments)
        else:
            fresh = _redrawn(module, "")
    like = next(module.parameters(), None)
    if like is not None:
        fresh.to(like.device, like.dtype)
    return fresh.requires_grad_(False).eval()


def _redrawn(module: nn.Module, path: str) -> nn.Module:
    """A module with its weights drawn again, its parts likewise."""
    if isinstance(module, PreTrainedModel):
        return type(module)(copy.deepcopy(module.config))
    make, config = getattr(type(module), "from_config", None), getattr(module, "config", None)
    if make is not None and config is not None:
        return make(config)
    fresh = copy.deepcopy(module)
    reset = getattr(fresh, "reset_parameters", getattr(fresh, "_reset_parameters", None))
    if reset is not None:
        reset()
    elif any(True for _ in fresh.parameters(recurse=False)):
        raise TypeError(
            f"{type(module).__name__}{f' ({path})' * bool(path)} has parameters, and neither a config nor "
            "reset_parameters to draw them again. Pass a network of random weights of your own."
        )
    for name, part in list(fresh.named_children()):
        setattr(fresh, name, _redrawn(part, f"{path}.{name}".strip(".")))
    return fresh


def check_pooling(pooling: str | None, class_token: bool) -> str | None:
    """The pooling, if the network has it.

    Raises:
        ValueError: With the poolings there are.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"Unknown pooling {pooling!r}; expected one of {', '.join(map(repr, POOLINGS))}.")
    if pooling == "cls" and not class_token:
        raise ValueError("pooling='cls' asks for a class token, which this network does not have; use 'mean'.")
    return pooling


def pair(size: int | tuple[int, int] | None, multiple: int = 1) -> tuple[int, int] | None:
    """A size as (H, W).

    Raises:
        ValueError: If it is neither one side nor (H, W), or not a multiple of the patch.
    """
    if size is None:
        return None
    values = (size, size) if isinstance(size, int) else tuple(size)
    if len(values) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"image_size must be one side or (height, width) in pixels; got {size!r}.")
    if any(v % multiple for v in values):
        near = tuple(max(multiple, round(v / multiple) * multiple) for v in values)
        raise ValueError(f"image_size={size!r} is no multiple of the patch, {multiple}; the nearest is {near}.")
    return values


def device_of(module: nn.Module) -> torch.device:
    """Where a module lies; the CPU for one without parameters."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def by_short_side(size: tuple[int, int], side: int, multiple: int) -> tuple[int, int]:
    """`size` scaled so that its short side is `side`, both rounded to multiples; the aspect ratio stays.

    Example:
        >>> by_short_side((32, 48), 224, 14)
        (224, 336)
    """
    h, w = (max(multiple, round(v * side / min(size) / multiple) * multiple) for v in size)
    return h, w
