"""What the card of a denoiser's training calls the result: words and tags of the base's own kind."""

from __future__ import annotations

import os
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub import is_repo_id

# What the network is conditioned on -> words, task of the Hub (it has none for classes of its own), further tags.
_KINDS: dict[str, tuple[str, str | None, tuple[str, ...]]] = {
    "captions": ("text-to-image diffusion model", "text-to-image", ("text-to-image",)),
    "labels": (
        "class-conditional diffusion model",
        "unconditional-image-generation",
        ("class-conditional-image-generation",),
    ),
    "maps": ("diffusion model conditioned on maps", "image-to-image", ("image-to-image",)),
}


def card_of(denoiser: Denoiser) -> dict[str, Any]:
    """`kind`, `pipeline_tag`, `tags` and `base_model` of `Objective.card`, as the denoiser's condition tells.

    Args:
        denoiser: What is trained.

    Returns:
        `base_model` only where the denoiser came from the Hub, and no `pipeline_tag` where the Hub has no fitting one.
    """
    conditioner = denoiser.conditioner
    if not conditioner.conditional:
        found: dict[str, Any] = {
            "kind": "unconditional diffusion model",
            "pipeline_tag": "unconditional-image-generation",
            "tags": ["diffusers", "unconditional-image-generation"],
        }
    else:
        other = (f"diffusion model conditioned on {conditioner.kind}", None, ())
        kind, task, tags = _KINDS.get(conditioner.kind, other)
        found = {"kind": kind, "pipeline_tag": task, "tags": ["diffusers", "image-generation", *tags]}
    name = denoiser.name
    if name is not None and "/" in name and is_repo_id(name) and not os.path.exists(name):
        found["base_model"] = name
    return found


__all__ = ["card_of"]
