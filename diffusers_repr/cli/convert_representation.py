"""`diffusers-repr convert` of RCG's representation diffusion models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def save_representation(weights: Mapping[str, Tensor], file: str, out: str, *, overwrite: bool) -> None:
    """Write an `RCGPipeline` of vectors alone.

    Args:
        weights: As selected from the checkpoint.
        file: Its name, for messages.
        out: Folder to write.
        overwrite: Replace the folder if it exists.

    Raises:
        ValueError: As `convert_representation`.
    """
    from diffusers import DDIMScheduler

    from diffusers_repr.hub.files import atomic_folder
    from diffusers_repr.models import RepresentationMLPModel
    from diffusers_repr.models.convert_representation import SCHEDULER, convert_representation
    from diffusers_repr.pipelines.rcg import RCGPipeline

    try:
        converted = convert_representation(weights)
    except ValueError as error:
        raise ValueError(f"{file!r}: {error}") from error
    network = RepresentationMLPModel(**converted.config)
    network.load_state_dict(converted.weights)
    with atomic_folder(Path(out), overwrite=overwrite) as folder:
        RCGPipeline(network.eval(), DDIMScheduler(**SCHEDULER)).save_pretrained(folder)
    config = converted.config
    count = sum(value.numel() for value in converted.weights.values())
    print(
        f"Wrote the representation diffusion of RCG to {out}: vectors of {config['in_channels']} channels, "
        f"{config['num_layers']} blocks of width {config['hidden_size']}, {config['num_classes']} classes, "
        f"{count / 1e6:.1f} M parameters. RCGPipeline.from_pretrained({out!r}) loads it."
    )
    for note in converted.notes:
        print(note)
