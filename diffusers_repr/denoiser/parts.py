"""Which components of a pipeline are its denoiser: network, scheduler, autoencoder."""

from __future__ import annotations

from typing import Any

from torch import nn

COMPONENTS = ("unet", "transformer")


def denoiser_parts(pipe: Any) -> tuple[nn.Module, Any, Any]:
    """Network, scheduler and autoencoder (or None) of a pipeline.

    Raises:
        TypeError: If it is no pipeline, or no component of it is a denoiser we know.
        ValueError: If the pipeline has two networks, one for high and one for low noise.
    """
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has two networks, `transformer` for high noise and `transformer_2` for low; "
            "features are of one: Denoiser(pipe.transformer, pipe.scheduler, pipe.vae, pipe=pipe). For the other "
            "leave out pipe=, and take the first one's condition: embeddings=denoiser.condition(...).inputs."
        )
    for component in COMPONENTS:
        model = getattr(pipe, component, None)
        if isinstance(model, nn.Module):
            return model, pipe.scheduler, getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if not hasattr(pipe, "components"):
        raise TypeError(
            f"A pipeline is needed; got {type(pipe).__name__}. Of a network and a scheduler make a denoiser by "
            "Denoiser(model, scheduler, vae); of a folder or Hub id by Denoiser.from_pretrained(id_or_folder)."
        )
    raise TypeError(
        f"{type(pipe).__name__} has no component named {' or '.join(COMPONENTS)} to take as the denoiser; "
        f"it has {', '.join(sorted(pipe.components))}. Build it from parts: Denoiser(model, scheduler, vae)."
    )


__all__ = ["COMPONENTS", "denoiser_parts"]
