"""`encode_queries`: texts, images and ready vectors to vectors that an index is searched by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser.images import image_items, to_pixels


def encode_queries(query: Any, encoder: Any = None) -> Tensor:
    """Vectors of queries, `(B, D)` float32 on the CPU, not normalised.

    Args:
        query: A text or a list of texts; images as `to_pixels` takes them, of any sizes; or vectors, a float tensor
            `(B, D)` or `(D,)`, which need no encoder.
        encoder: An `Encoder`, of which the global features are taken, or an `ImageTextEncoder`.

    Raises:
        TypeError: For what is neither.
        ValueError: For texts and an encoder without texts, images without an encoder, an empty list, NaN.

    Example:
        >>> encode_queries(torch.tensor([1.0, 2.0]))
        tensor([[1., 2.]])
    """
    if isinstance(query, Tensor) and query.ndim <= 2 and query.is_floating_point():
        vectors = query.detach().float().cpu()
        vectors = vectors[None] if vectors.ndim == 1 else vectors
    else:
        texts = [query] if isinstance(query, str) else query
        if isinstance(texts, Sequence) and texts and all(isinstance(one, str) for one in texts):
            vectors = _of_texts(list(texts), encoder)
        else:
            vectors = _of_images(query, encoder)
    if not bool(vectors.isfinite().all()):
        raise ValueError("The vectors of the queries have NaN or infinite values.")
    return vectors


def _of_texts(texts: list[str], encoder: Any) -> Tensor:
    if not hasattr(encoder, "embed_texts"):
        what = "no encoder was given" if encoder is None else f"{encoder!r} has none for texts"
        raise ValueError(f"The query is text, and {what}; pass an ImageTextEncoder of the index, or an image.")
    return encoder.embed_texts(texts).cpu()


def _of_images(images: Any, encoder: Any) -> Tensor:
    items = image_items(images)
    if not items:
        raise ValueError("No query: the list is empty.")
    if encoder is None:
        raise ValueError("The query is an image, and no encoder was given; pass the encoder of the index.")
    if hasattr(encoder, "embed_images"):
        return torch.cat([encoder.embed_images(to_pixels([item])).cpu() for item in items])
    return torch.cat(
        [encoder.encode_pixels(to_pixels([item], encoder.channels)).global_features.cpu() for item in items]
    )


__all__ = ["encode_queries"]
