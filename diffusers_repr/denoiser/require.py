"""What functions that take a `Denoiser` refuse."""

from __future__ import annotations

from typing import Any

from diffusers_repr.denoiser.denoiser import Denoiser


def require_denoiser(value: Any) -> None:
    """Raise TypeError unless `value` is a `Denoiser`."""
    if not isinstance(value, Denoiser):
        raise TypeError(
            f"A Denoiser is needed; got {type(value).__name__}. Make one: Denoiser.from_pipe(pipe), or "
            "Denoiser.from_pretrained(folder_or_id)."
        )


def require_images(denoiser: Denoiser, what: str) -> None:
    """Raise ValueError for a network of videos, or of vectors.

    Args:
        denoiser: The network.
        what: Is for images alone; begins a sentence.
    """
    require_denoiser(denoiser)
    if denoiser.family.axes == 0:
        raise ValueError(f"{what}: for networks of images; {type(denoiser.model).__name__} denoises vectors.")
    if denoiser.family.axes != 2:
        raise ValueError(
            f"{what}: for networks of images; {type(denoiser.model).__name__} makes videos. What there is for those: "
            "features (FeatureExtractor, capture, list_layers), PAG and CFG."
        )


__all__ = ["require_denoiser", "require_images"]
