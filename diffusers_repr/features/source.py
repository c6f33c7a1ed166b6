"""`FeatureSource`: what tasks on pixels read features by, so that ways of making them are exchangeable."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, TypedDict, TypeGuard, Unpack, runtime_checkable

from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.pooling import leaves_maps


class SourceArguments(TypedDict, total=False):
    """What goes into a source beside the images; each may be left out.

    Attributes:
        prompt: One for all images or one per image.
        class_labels: One id for all images or one per image.
        embeddings: Ready network inputs; see `Denoiser.condition`.
        ids: A stable name per image, the key of its noise; its pixels if None.
    """

    prompt: str | Sequence[str] | None
    class_labels: int | Sequence[int] | Tensor | None
    embeddings: Mapping[str, Any] | None
    ids: Sequence[Any] | None


@runtime_checkable
class FeatureSource(Protocol):
    """Images to named features. `FeatureExtractor` is one; a class with these members is another.

    The features of an image depend on the image, its prompt or label and its id, never on its neighbours in the batch.

    Attributes:
        denoiser: The base model.
        layers: Names of the features that a call gives, in order.
        image_size: (H, W) to which images are brought, stretched; `"keep"` if they keep their own.
    """

    denoiser: Denoiser
    layers: list[str]
    image_size: tuple[int, int] | Literal["keep"]

    def __call__(self, images: Any, **arguments: Unpack[SourceArguments]) -> FeatureOutput:
        """Features of images; `.as_map(layer)` gives `(B, C, h, w)`.

        Args:
            images: PIL images, numpy arrays or tensors, see `to_pixels`.
            **arguments: By these names: `prompt`, `class_labels`, `embeddings`, `ids`; see `SourceArguments`.
        """
        ...


class BaseFeatureSource(FeatureSource, ABC):
    """A source that reads the pixels of images of one size: write `from_pixels`."""

    def __call__(
        self,
        images: Any,
        *,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        embeddings: Mapping[str, Any] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> FeatureOutput:
        """Features of images.

        Args:
            images: PIL images, numpy arrays or tensors, see `to_pixels`; for a network of videos also videos, see
                `to_video_pixels`.
            prompt: One for all images or one per image.
            class_labels: One id for all images or one per image.
            embeddings: Ready network inputs; see `Denoiser.condition`.
            ids: A stable name per image, the key of its noise; its pixels if None.

        Raises:
            ValueError: For images, prompts, labels or ids that do not fit the model or each other.
            FloatingPointError: If a layer gives NaN or infinity; names the layer.
            RuntimeError: If the network was compiled, and while another thread reads it where that cannot be right:
                with offloaded weights, with `fresh` noise.
        """
        pixels = self.denoiser.pixels(images, self.image_size)
        found = self.from_pixels(pixels, prompt=prompt, class_labels=class_labels, embeddings=embeddings, ids=ids)
        return replace(found, images=images) if leaves_maps(found.pooling) else found

    @abstractmethod
    def from_pixels(self, pixels: Tensor, **arguments: Unpack[SourceArguments]) -> FeatureOutput:
        """As a call, from `(B, C, H, W)` or `(B, C, frames, H, W)` in [-1, 1]; `image_size` is not applied."""


def is_source(source: Any) -> TypeGuard[FeatureSource]:
    """Whether it has what a `FeatureSource` has; no property of it is asked, for it may raise."""
    return callable(source) and not isinstance(source, type) and not _missing(source)


def require_source(source: Any) -> FeatureSource:
    """The source, if it is one.

    Raises:
        TypeError: For anything else, a network or a denoiser among them; says what is missing.
    """
    if is_source(source):
        return source
    missing = _missing(source)
    lacking = f" It has no {' and no '.join(missing)}." if missing else ""
    raise TypeError(
        f"Features are read by a source, such as FeatureExtractor(denoiser, layers, timestep); got "
        f"{'type' if isinstance(source, type) else type(source).__name__}.{lacking}"
    )


def _missing(source: Any) -> list[str]:
    return [name for name in ("denoiser", "layers", "image_size") if not _has(source, name)]


def _has(source: Any, name: str) -> bool:
    """Whether it has an attribute; a property is not asked, for it may raise."""
    try:
        inspect.getattr_static(source, name)
    except AttributeError:
        return False
    return True


__all__ = ["BaseFeatureSource", "FeatureSource", "SourceArguments", "is_source", "require_source"]
