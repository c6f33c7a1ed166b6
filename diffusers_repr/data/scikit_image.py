"""scikit-image, which photographs, known changes of them, SIFT and homographies need."""

from __future__ import annotations

from typing import Any


def require_scikit_image() -> Any:
    """The `skimage` package with `data`, `feature`, `measure` and `transform`.

    Raises:
        ImportError: If it is missing; names the extra.
    """
    try:
        import skimage
        import skimage.data
        import skimage.feature
        import skimage.measure
        import skimage.transform
    except ImportError as error:
        raise ImportError('This needs scikit-image: pip install "diffusers-repr[match]"') from error
    return skimage


__all__ = ["require_scikit_image"]
