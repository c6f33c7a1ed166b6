"""A layer of a denoiser at one noise level, as a source of features."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.layers import Layer
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.untrained import untrained, with_network
from diffusers_repr.encoders.source import Source, pair
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.hub.identity import config_hash
from diffusers_repr.noise import NoiseLevel


class DenoiserSource(Source):
    """A `FeatureExtractor` with one layer and one level; noise is drawn per image.

    Args:
        denoiser: See `Encoder.from_denoiser`, also for the rest.
        layer: Full module path.
        timestep: Training timestep or `NoiseLevel`.
        condition: Prompt, class id, embeddings or None.
        noise_seed: Of the noise.
        image_size: Resize to (H, W) or a square.
    """

    mean, std = (0.5,), (0.5,)  # denoisers take pixels in [-1, 1]

    def __init__(
        self,
        denoiser: Denoiser,
        layer: str,
        timestep: int | float | NoiseLevel,
        condition: str | int | Mapping[str, Any] | None = None,
        noise_seed: int = 0,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        require_images(denoiser, "Encoders")
        self.extractor = FeatureExtractor(denoiser, layer, timestep, seed=noise_seed)
        self.denoiser, self.layer, self.image_size = denoiser, layer, pair(image_size, denoiser.multiple)
        if self.extractor.many:
            raise ValueError(f"An encoder reads one noise level; got timestep={timestep!r}.")
        self.module, self.channels = denoiser.model, denoiser.image_channels
        self.condition, self._given = _condition(condition), condition
        self._table = lru_cache(maxsize=None)(self._measure)

    @property
    def timestep(self) -> float:
        """The training timestep."""
        return float(self.extractor.levels[0].timestep)

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Channels of the layer."""
        return self._table(self.image_size or self.denoiser.image_size).channels

    def _measure(self, size: tuple[int, int]) -> Layer:
        found = [row for row in list_layers(self.denoiser, size, "all") if row.path == self.layer]
        if not found:
            raise ValueError(f"Layer {self.layer!r} gives no image; `list_layers(denoiser)` shows those that do.")
        return found[0]

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """As given, or as it is."""
        return self.image_size or size

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the layer's map or image tokens."""
        return self._table(size).grid

    def read(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """The layer's features; text tokens are left out."""
        found = self.extractor.from_pixels(pixels, **self.condition).feature_map(self.layer)
        tokens, (height, width) = found.tokens(), found.grid
        return tokens.mean(1), tokens, (height, width)

    def read_with_gradient(self, pixels: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """As `read`, as a graph."""
        found = self.extractor.with_gradient(pixels, **self.condition).feature_map(self.layer)
        tokens, (height, width) = found.tokens(), found.grid
        return tokens.mean(1), tokens, (height, width)

    def with_module(self, module: nn.Module) -> DenoiserSource:
        """The same layer, level and noise of another network in the same pipeline."""
        return self._of(with_network(self.denoiser, module))

    def untrained(self, seed: int) -> DenoiserSource:
        """Of the network with the random weights that it starts training from."""
        return self._of(untrained(self.denoiser, seed))

    def _of(self, denoiser: Denoiser) -> DenoiserSource:
        level, seed = self.extractor.levels[0], self.extractor.seed
        return DenoiserSource(denoiser, self.layer, level, self._given, seed, self.image_size)

    def describe(self) -> dict[str, Any]:
        """Class, config, layer, level, condition and seed."""
        level = self.extractor.levels[0]
        known = {key: value for key, value in self.condition.items() if isinstance(value, (str, int))}
        return {
            "model": type(self.module).__name__,
            "config": config_hash(dict(self.denoiser.config)),
            "layer": self.layer,
            "timestep": self.timestep,
            "nsr": float(level.nsr),
            "condition": known or (config_hash(_values(self.condition)) if self.condition else None),
            "noise_seed": self.extractor.seed,
            "image_size": None if self.image_size is None else list(self.image_size),
        }


def _condition(condition: str | int | Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the extractor's call."""
    if condition is None:
        return {}
    if isinstance(condition, str):
        return {"prompt": condition}
    if isinstance(condition, Mapping):
        return {"embeddings": condition}
    if isinstance(condition, bool) or not hasattr(condition, "__index__"):
        raise TypeError(
            f"condition is a prompt, a class id, or a mapping of embeddings; got {type(condition).__name__}."
        )
    return {"class_labels": int(condition)}


def _values(condition: Mapping[str, Any]) -> dict[str, Any]:
    embeddings = condition["embeddings"]
    return {key: value.tolist() if isinstance(value, Tensor) else value for key, value in embeddings.items()}
