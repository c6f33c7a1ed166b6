"""`GenericFamily`: any module, by the names of its two inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.family import Family, Grid
from diffusers_repr.noise import NoiseLevel


class GenericFamily(Family):
    """Any `nn.Module` whose forward takes the noisy input and the timestep by the names given here.

    Args:
        sample: Keyword of the noisy input.
        timestep: Keyword of the timestep.
        channels: Channels of x_0.
        timestep_fn: From a resolved level to what the network is told, a number or tensor; the timestep by default.
        training_timestep_fn: The inverse of `timestep_fn`, which guidance reads the level of a call by.
        grid_fn: `(tokens, (H, W)) -> (h, w)`: the token grid, for models with tokens.
    """

    def __init__(
        self,
        sample: str = "sample",
        timestep: str = "timestep",
        channels: int = 3,
        timestep_fn: Callable[[NoiseLevel], Any] | None = None,
        grid_fn: Callable[[int, tuple[int, ...]], tuple[int, ...] | None] | None = None,
        training_timestep_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.sample_name, self.timestep_name, self._channels = sample, timestep, channels
        self._timestep_fn, self._grid_fn, self._training_timestep_fn = timestep_fn, grid_fn, training_timestep_fn

    def channels(self) -> int:
        """As given."""
        return self._channels

    def timestep(self, level: NoiseLevel, x_t: Tensor) -> Tensor:
        """By `timestep_fn`."""
        if self._timestep_fn is None:
            return super().timestep(level, x_t)
        return torch.as_tensor(self._timestep_fn(level), device=x_t.device).expand(x_t.shape[0])

    def training_timestep(self, model_timestep: Tensor) -> Tensor:
        """By `training_timestep_fn`.

        Raises:
            ValueError: If `timestep_fn` was given without its inverse.
        """
        if self._training_timestep_fn is not None:
            return self._training_timestep_fn(model_timestep)
        if self._timestep_fn is not None:
            raise ValueError(
                "The noise level of a call is not known: this GenericFamily has a timestep_fn and no inverse of it. "
                "Give training_timestep_fn=, from what the network is told to the training timestep."
            )
        return model_timestep

    def grid(self, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """By `grid_fn`, else as a U-Net's."""
        if self._grid_fn is None:
            return super().grid(tokens, size)
        found = self._grid_fn(tokens, size)
        return None if found is None else (found, 0)


__all__ = ["GenericFamily"]
