"""Any network that gives a vector a patch, as a source of features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.encoders.source import Source, check_pooling, device_of, pair
from diffusers_repr.hub.checks import check_sizes


class ModuleSource(Source):
    """An `nn.Module`, or a method of it.

    Args:
        module: See `Encoder.from_module`, also for the rest.
        patch_size: Pixels a token, along a side.
        forward: What is called instead of the module.
        prefix_tokens: Tokens in front of those of the patches.
        pooling: `cls`, `mean`, or None.
        channels: Of the images.
        mean: Of pixels in [0, 1].
        std: As `mean`.
        image_size: Resize to (H, W) or a square.

    Raises:
        ValueError: For sizes that do not fit the patch, or a pooling that is not there.
    """

    def __init__(
        self,
        module: nn.Module,
        patch_size: int,
        forward: Callable[[Tensor], Any] | None = None,
        prefix_tokens: int = 0,
        pooling: str | None = None,
        channels: int = 3,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"An nn.Module is needed; got {type(module).__name__}. Pass a method of it by `forward=`.")
        check_sizes(patch_size=patch_size)
        self.module, self.patch, self.prefix, self.channels = module, patch_size, prefix_tokens, channels
        self.forward = module if forward is None else forward
        self.mean, self.std = (
            (float(v),) if isinstance(v, (int, float)) else tuple(float(x) for x in v) for v in (mean, std)
        )
        if 0 in self.std:
            raise ValueError(f"std={std!r} must not hold 0.")
        self.pooling = check_pooling(pooling, prefix_tokens > 0) or ("cls" if prefix_tokens else "mean")
        self.image_size = pair(image_size, patch_size)
        self._dim: int | None = None

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Found by one forward of a grey image of `image_size`, or of 2 x 2 patches."""
        if self._dim is None:
            size = self.image_size or (2 * self.patch, 2 * self.patch)
            with torch.no_grad(), eval_mode(self.module):
                self.read(torch.zeros(1, self.channels, *size, device=device_of(self.module)))
        assert self._dim is not None
        return self._dim

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As given, or as it is."""
        return self.image_size or size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """In patches.

        Raises:
            ValueError: If the size is no multiple of the patch.
        """
        if size[0] % self.patch or size[1] % self.patch:
            raise ValueError(
                f"Images are {size[0]} x {size[1]}, no multiple of the patch, {self.patch}; pass image_size=(H, W)."
            )
        return size[0] // self.patch, size[1] // self.patch

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """One forward.

        Raises:
            ValueError: If it does not give a token a patch.
        """
        grid = self.grid((pixels.shape[2], pixels.shape[3]))
        output = self.forward(pixels.to(floating_dtype(self.module)))
        sequence = getattr(output, "last_hidden_state", output)
        if isinstance(sequence, Tensor) and sequence.ndim == 4:
            sequence = FeatureMap.from_map(sequence).tokens()
        shape = tuple(sequence.shape) if isinstance(sequence, Tensor) else type(sequence).__name__
        if (
            not isinstance(sequence, Tensor)
            or sequence.ndim != 3
            or sequence.shape[1] != self.prefix + grid[0] * grid[1]
        ):
            raise ValueError(
                f"{type(self.module).__name__} gave {shape} for images of {pixels.shape[2]} x {pixels.shape[3]}; "
                f"with patch_size={self.patch} and prefix_tokens={self.prefix}, ({len(pixels)}, "
                f"{self.prefix + grid[0] * grid[1]}, D) or a map of {grid} is expected."
            )
        tokens = sequence[:, self.prefix :]
        self._dim = tokens.shape[2]
        return sequence[:, 0] if self.pooling == "cls" else tokens.float().mean(1), tokens, grid

    def with_module(self, module: nn.Module) -> ModuleSource:
        """The same reading of another network; a method that is called instead of it becomes that one's.

        Raises:
            TypeError: If what is called instead is no method of the network, so that it cannot be asked of another.
        """
        owner = getattr(self.forward, "__self__", None)
        if self.forward is not self.module and owner is not self.module:
            raise TypeError(
                f"forward= is {self.forward!r}, no method of {type(self.module).__name__}: it would go on reading the "
                "old network. Pass a method of the module."
            )
        made = copy.copy(self)
        made.module = module
        made.forward = module if self.forward is self.module else getattr(module, str(self.forward.__name__))
        return made

    def describe(self) -> dict[str, Any]:
        """Class, forward, patch, pooling and size."""
        return {
            "model": type(self.module).__name__,
            "forward": getattr(self.forward, "__name__", type(self.forward).__name__),
            "patch_size": self.patch,
            "prefix_tokens": self.prefix,
            "pooling": self.pooling,
            "image_size": None if self.image_size is None else list(self.image_size),
        }
