"""What extraction returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffusers_repr.denoiser.family import Grid
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.features.pca import draw_pca
from diffusers_repr.features.pooling import leaves_maps
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.noise import NoiseLevel


@dataclass(frozen=True, repr=False)
class FeatureOutput:
    """Features of a batch of images.

    Attributes:
        features: Layer path -> float32 tensor: a map `(B, C, H, W)`, of a video `(B, C, frames, H, W)`, tokens
            `(B, N, C)`, or `(B, D)` if pooled. With a list of timesteps, one more dimension in front: `(T, B, ...)`.
        level: The resolved noise level; the list of them with a list of timesteps.
        places: Layer path -> `((H, W), start)` for layers of tokens: grid and first token of the image.
        pooling: As asked for.
        image_size: (H, W) of the images as the network saw them, of videos (frames, H, W).
        images: What was passed, for pictures; None for pooled features.
    """

    features: Mapping[str, Tensor]
    level: NoiseLevel | list[NoiseLevel]
    places: Mapping[str, Grid]
    pooling: str | None = None
    image_size: tuple[int, ...] | None = None
    images: Any = None

    def __getitem__(self, layer: str) -> Tensor:
        return self.features[layer]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{layer!r}: {tuple(feature.shape)}" for layer, feature in self.features.items())
        known = [(level, level.timestep) for level, _ in self.per_level()]
        levels = ", ".join(repr(level) if time is None else f"{float(time):g}" for level, time in known)
        timestep = f"[{levels}]" if isinstance(self.level, list) else levels
        return (
            f"FeatureOutput({{{shapes}}},\n"
            f"    timestep={timestep}, pooling={self.pooling!r}, image_size={self.image_size})"
        )

    @property
    def layers(self) -> list[str]:
        """Layer paths, in the order asked for."""
        return list(self.features)

    def feature_map(self, layer: str) -> FeatureMap:
        """The layer with its grid; with a list of timesteps, `(T, B, ...)`.

        Raises:
            KeyError: For a layer that was not asked for.
            ValueError: For pooled features, and for tokens of an unknown grid.
        """
        if layer not in self.features:
            raise KeyError(f"Layer {layer!r} was not extracted; there are {', '.join(self.features)}.")
        if not leaves_maps(self.pooling):
            raise ValueError(f"Features were pooled ({self.pooling}); extract with pooling=None for maps.")
        feature = self.features[layer]
        if layer in self.places:
            return FeatureMap(feature, *self.places[layer])
        axes = feature.ndim - isinstance(self.level, list) - 2
        if axes < 2:
            raise ValueError(f"Layer {layer!r} gave {tuple(feature.shape)}: neither a map nor tokens of a known grid.")
        return FeatureMap.from_map(feature, axes)

    def as_map(self, layer: str) -> Tensor:
        """The layer as `(B, C, H, W)`, text tokens dropped; `(T, B, C, H, W)` with a list of timesteps.

        Of a video `(B, C, frames, H, W)`.

        Raises:
            KeyError, ValueError: As `feature_map`.
        """
        return self.feature_map(layer).as_map()

    def plot_pca(self, layer: str, images: Any = None, *, limit: int = 8) -> Any:
        """A figure of matplotlib: each image, and beside it its first three principal components as colours.

        The components are those of all images of a level together: equal colours mean like features. With a list of
        timesteps a column for each. `figure.savefig("pca.png")` keeps it; a notebook shows it.

        Args:
            layer: Its path; of maps, or tokens of a known grid.
            images: To be shown beside, of any size, the same whole images; what was passed to the extractor if None.
            limit: How many are shown, the first ones.

        Raises:
            KeyError, ValueError: As `feature_map`; for videos, and for fewer than three channels.
            ImportError: If matplotlib is missing.
        """
        found = self.as_map(layer)
        several = isinstance(self.level, list)
        if found.ndim != 4 + several:
            raise ValueError(f"Layer {layer!r} gave {tuple(found.shape)}, of videos; `plot_pca` is of images.")
        levels = self.level if isinstance(self.level, list) else [self.level]
        images = self.images if images is None else images
        if images is None:
            raise ValueError("These features came without their images; pass plot_pca(layer, images).")
        maps = list(found) if several else [found]
        names = [repr(level) if level.timestep is None else f"timestep {level.timestep:g}" for level in levels]
        return draw_pca(maps, images, layer, names, check_whole("limit", limit))

    def per_level(self) -> Iterator[tuple[NoiseLevel, FeatureOutput]]:
        """One output a level, for a list of timesteps."""
        if not isinstance(self.level, list):
            yield self.level, self
            return
        for at, level in enumerate(self.level):
            yield level, replace(self, features={k: v[at] for k, v in self.features.items()}, level=level)
