"""Teachers: the features of frozen encoders for a batch, from a cache or on the fly, each made once a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import FeatureMap
from diffusers_repr.encoders import EncoderInfo, ImageEncoder
from diffusers_repr.objectives.base import Batch


@dataclass(frozen=True)
class CachedFeatures:
    """Stands for an encoder whose features are all in a cache, so that its network need not be loaded.

    Attributes:
        name: Of the features in the batch.
        dim: Their channels.
        grid: Their (h, w).
        fingerprint_of: What the cache's manifest says of the encoder.
    """

    name: str
    dim: int
    grid: tuple[int, int]
    fingerprint_of: Mapping[str, Any] | None = None

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid, whatever the size."""
        return self.grid

    def fingerprint(self) -> dict[str, Any]:
        """As the manifest says."""
        return dict(self.fingerprint_of or {"name": self.name, "dim": self.dim, "grid": list(self.grid)})


def name_encoders(encoders: Sequence[Any] | Mapping[str, Any]) -> dict[str, EncoderInfo]:
    """Encoders by name.

    Raises:
        ValueError: For two of one name.
        TypeError: For what is no encoder.
    """
    named = dict(encoders) if isinstance(encoders, Mapping) else {}
    for encoder in () if isinstance(encoders, Mapping) else encoders:
        name = getattr(encoder, "name", None)
        if not isinstance(name, str):
            raise TypeError(f"Expected an Encoder, got {type(encoder).__name__}; `Encoder.from_pretrained` makes one.")
        if name in named:
            raise ValueError(f"Two encoders are called {name!r}; pass them as {{name: encoder}}.")
        named[name] = encoder
    for name, encoder in named.items():
        if not isinstance(encoder, EncoderInfo):
            raise TypeError(f"Encoder {name!r} is a {type(encoder).__name__}; expected an Encoder or CachedFeatures.")
    return named


class Teachers:
    """What the encoders say of one batch; every forward of an encoder is made at most once.

    Args:
        encoders: By name.
        batch: `features` and `features_global` in it are taken first, by the encoder's name.
        size: (H, W) of its images in pixels.
        device: Where features are wanted.
        attentions: Name of an encoder -> its blocks whose attention is wanted too, in the same forward.
    """

    def __init__(
        self,
        encoders: Mapping[str, Any],
        batch: Batch,
        size: tuple[int, int],
        device: torch.device,
        attentions: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.encoders, self.batch, self.size, self.device = encoders, batch, size, device
        self.attentions = attentions or {}
        self._outputs: dict[str, tuple[Any, list[Tensor]]] = {}

    def tokens(self, name: str) -> FeatureMap:
        """Features on the encoder's grid, without a graph.

        Raises:
            ValueError: For cached features of another number of tokens or channels.
        """
        cached = self.batch.get("features", {}).get(name)
        if cached is None:
            output = self._output(name)
            return FeatureMap(output.tokens, output.grid)
        encoder = self.encoders[name]
        grid = encoder.grid_for(self.size)
        if cached.ndim != 3 or cached.shape[1:] != (grid[0] * grid[1], encoder.dim):
            raise ValueError(
                f"The cached features {name!r} are {tuple(cached.shape)}; expected (B, {grid[0]} * {grid[1]}, "
                f"{encoder.dim}) for images of {self.size[0]} x {self.size[1]}. Make the cache anew with this encoder."
            )
        return FeatureMap(cached.to(self.device), grid)

    def global_features(self, name: str) -> Tensor:
        """One vector an image, `(B, D)`."""
        cached = self.batch.get("features_global", {}).get(name)
        return self._output(name).global_features if cached is None else cached.to(self.device)

    def attention(self, name: str) -> list[Tensor]:
        """Attention probabilities `(B, heads, N, N)` of the blocks in `attentions`."""
        return [part.to(self.device) for part in self._run(name)[1]]

    def _live(self, name: str) -> Any:
        encoder = self.encoders[name]
        problem = missing(name, encoder, self.batch)
        if problem:
            raise ValueError(problem)
        if getattr(encoder, "device", self.device) != self.device:
            encoder.to(self.device)
        return encoder

    def _output(self, name: str) -> Any:
        return self._run(name)[0]

    def _run(self, name: str) -> tuple[Any, list[Tensor]]:
        if name not in self._outputs:
            encoder, pixels = self._live(name), self.batch["pixel_values"]
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                if name in self.attentions:
                    self._outputs[name] = encoder.encode_with_attention(pixels, self.attentions[name])
                else:
                    self._outputs[name] = encoder.encode_pixels(pixels), []
        return self._outputs[name]


def missing(name: str, encoder: EncoderInfo, batch: Mapping[str, Any]) -> str | None:
    """Why an encoder cannot be run on a batch; None if it can."""
    if not isinstance(encoder, ImageEncoder):
        there = sorted(batch.get("features", {}))
        return f"The batch has no cached features {name!r} (it has {there or 'none'}), and the encoder is not loaded."
    if batch.get("pixel_values") is None:
        return (
            f"The batch has neither pixel_values for encoder {name!r} nor its cached features; cache the features "
            "together with the latents, or train on images."
        )
    return None


__all__ = ["CachedFeatures", "Teachers", "missing", "name_encoders"]
