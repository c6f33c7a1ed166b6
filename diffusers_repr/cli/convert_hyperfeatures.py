"""`diffusers-repr convert` of the published networks of Diffusion Hyperfeatures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def save_hyperfeatures(
    checkpoint: Mapping[str, Any], file: str, out: str, base: str | None, *, overwrite: bool
) -> None:
    """Write a head with its config, the record of its base, and a card.

    Args:
        checkpoint: As read.
        file: Its name, for messages.
        out: Folder to write.
        base: Folder or Hub id of the model it was trained on.
        overwrite: Replace the folder if it exists.

    Raises:
        ValueError: Without a base; as `convert_hyperfeatures`.
        FileNotFoundError, OSError: If the base cannot be loaded.
    """
    from diffusers_repr.cli.converted_head import base_of, write_head
    from diffusers_repr.heads.convert_hyperfeatures import convert_hyperfeatures
    from diffusers_repr.hub.places import without_places

    what = "the network of Diffusion Hyperfeatures, which reads the layers of a base"
    denoiser = base_of(checkpoint, file, what, base)
    try:
        head, notes = convert_hyperfeatures(checkpoint, denoiser)
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    config = head.config
    layers, reads, steps = len(config["layers"]), len(head.reads), config["steps"]
    text = f"""A `HyperfeaturesHead` converted from a published checkpoint of Diffusion Hyperfeatures (Luo et al. 2023,
[arXiv 2305.14334](https://arxiv.org/abs/2305.14334)). It mixes {layers} layers of
`{without_places(str(config["base_model"]))}` at {reads} of {steps} steps of a DDIM inversion.

`Hyperfeatures.from_pretrained` of `diffusers_repr.heads` loads it with its base; every task that reads features takes
it. The license is that of the checkpoint."""
    told = (
        f"Wrote a head of Hyperfeatures to {out}: {layers} layers of {base!r} at {reads} of {steps} steps, "
        f"{sum(p.numel() for p in head.parameters()) / 1e6:.1f} M parameters. Hyperfeatures.from_pretrained({out!r}) "
        "reads images with it."
    )
    write_head(head, out, text, ["hyperfeatures", "feature-extraction"], notes, told, overwrite=overwrite)
