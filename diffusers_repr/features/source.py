"""`FeatureSource`: what tasks on pixels read features by, so that ways of making them are exchangeable."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.output import FeatureOutput


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

    def __call__(
        self,
        images: Any,
        *,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        embeddings: Mapping[str, Any] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> FeatureOutput:
        """Features of images; `.as_map(layer)` gives `(B, C, h, w)`.

        Args:
            images: PIL images, numpy arrays or tensors, see `to_pixels`.
            prompt: One for all images or one per image.
            class_labels: One id for all images or one per image.
            embeddings: Ready network inputs; see `Denoiser.condition`.
            ids: A stable name per image, the key of its noise; its pixels if None.
        """
        ...


def require_source(source: Any) -> FeatureSource:
    """The source, if it is one.

    Raises:
        TypeError: For anything else, a network or a denoiser among them; says what is missing.
    """
    missing = [name for name in ("denoiser", "layers", "image_size") if not _has(source, name)]
    if callable(source) and not missing and not isinstance(source, type):
        return source
    lacking = f" It has no {' and no '.join(missing)}." if missing else ""
    raise TypeError(
        f"Features are read by a source, such as FeatureExtractor(denoiser, layers, timestep); got "
        f"{type(source).__name__}.{lacking}"
    )


def _has(source: Any, name: str) -> bool:
    """Whether it has an attribute; a property is not asked, for it may raise."""
    try:
        inspect.getattr_static(source, name)
    except AttributeError:
        return False
    return True


__all__ = ["FeatureSource", "require_source"]
