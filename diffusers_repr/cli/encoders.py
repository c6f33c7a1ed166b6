"""Encoders as commands name them: a vision transformer, `MODEL:layer@timestep`, or a CLIP for its text space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_repr.encoders import Encoder
    from diffusers_repr.encoders.image_text import ImageTextEncoder


def open_encoder(
    spec: str, *, revision: str | None, dtype: str, positions: Any, text_space: bool, seed: int
) -> Encoder | ImageTextEncoder:
    """What gives a vector an image, on the CPU.

    Args:
        spec: A vision transformer, `MODEL:layer@timestep`, or with `text_space` a CLIP.
        revision: On the Hub.
        dtype: Of the network.
        positions: How position embeddings of a vision transformer are resampled; not asked of a layer.
        text_space: Whether vectors are of the space that images share with texts.
        seed: Of a denoiser's noise.

    Raises:
        ValueError: For a pipeline without a layer.
        TypeError, OSError: As `Encoder.from_pretrained` and `Denoiser.from_pretrained`.
    """
    import torch

    from diffusers_repr.encoders import load_encoder
    from diffusers_repr.encoders.image_text import ImageTextEncoder
    from diffusers_repr.encoders.loading import split_layer

    if text_space:
        return ImageTextEncoder.from_pretrained(spec, revision)
    options = {} if split_layer(spec) else {"positions": positions}
    return load_encoder(spec, revision=revision, dtype=getattr(torch, dtype), seed=seed, **options)
