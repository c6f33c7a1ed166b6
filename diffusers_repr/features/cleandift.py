"""Features of networks tuned by CleanDIFT: of the image itself, without noise and without a level to choose."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.decoder_units import decoder_units
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.hub import load_json_config, resolve_folder
from diffusers_repr.hub.schema import listing, number, record, text

RECORD = "cleandift.json"  # beside the pipeline that was tuned
TIMESTEP = 261.0  # that the tuned network is told, unless its folder tells another
_SCHEMA = record({"layers": listing(text(500), 1, 1000), "timestep": number(-1e9, 1e9)}, others=True)


def cleandift_layers(model: nn.Module) -> list[str]:
    """The maps of a U-Net that CleanDIFT aligns: the middle and one after each unit on the way up, in their order.

    A unit gives the output of its attention, or of its resnet where there is none; the last of a stage that of the
    stage, after its upsampling. Of the last stage the first unit alone: what comes after is close to the output. Of
    Stable Diffusion these are the paper's eleven.

    Args:
        model: The network.

    Raises:
        ValueError: For a network without a middle and up-blocks.
    """
    stages = decoder_units(model)
    if not stages or getattr(model, "mid_block", None) is None:
        raise ValueError(
            f"{type(model).__name__} has no mid_block and up_blocks; name the layers, such as blocks of a "
            "transformer. `list_layers(denoiser)` shows them."
        )
    paths = ["mid_block"]
    for i, units in enumerate(stages[:-1]):
        paths += [*units[:-1], f"up_blocks.{i}"]
    return [*paths, stages[-1][0]]


def cleandift_extractor(
    base: str | os.PathLike[str] | Denoiser,
    layers: str | Sequence[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    **settings: Any,
) -> FeatureExtractor:
    """A `FeatureExtractor` of a tuned network: the clean image is read, at the one timestep that it was tuned with.

    Args:
        base: The folder or Hub id that `examples/train_cleandift.py` wrote; or a `Denoiser` whose weights were tuned,
            such as the published ones, told 261.
        layers: Full module paths; all that were aligned if None. Correspondence reads the last of the middle
            resolution, `up_blocks.1` of Stable Diffusion.
        revision: Of a Hub id.
        token: Hub token.
        **settings: Of `FeatureExtractor`, without `timestep`, `noise` and `ensemble_size`.

    Raises:
        FileNotFoundError: For a folder that is no result of CleanDIFT: it has no `cleandift.json`.
        TypeError: For settings that the tuning has settled.
        ValueError: As `FeatureExtractor`; for a damaged record.
    """
    settled = [name for name in ("timestep", "noise", "ensemble_size") if name in settings]
    if settled:
        raise TypeError(
            f"{settled[0]} is settled by the tuning: the clean image is read at one timestep; leave it out."
        )
    if isinstance(base, Denoiser):
        denoiser, timestep = base, TIMESTEP
        layers = cleandift_layers(denoiser.model) if layers is None else layers
    else:
        folder = resolve_folder(base, revision, token)
        if not (folder / RECORD).is_file():
            raise FileNotFoundError(
                f"{str(base)!r} has no {RECORD}: it was not tuned by CleanDIFT. examples/train_cleandift.py tunes it; "
                "a plain model is read by FeatureExtractor(denoiser, layers, timestep)."
            )
        told = load_json_config(folder, RECORD)
        _SCHEMA(told, f"{RECORD} of {str(base)!r}")
        denoiser, timestep = Denoiser.from_pretrained(folder, token=token), float(told["timestep"])
        denoiser.name, denoiser.revision = os.fspath(base), revision
        layers = list(told["layers"]) if layers is None else layers
    if not math.isfinite(timestep):
        raise ValueError(f"{RECORD} tells the timestep {timestep}, which is no number.")
    return FeatureExtractor(denoiser, layers, timestep, "clean", **settings)


__all__ = ["RECORD", "TIMESTEP", "cleandift_extractor", "cleandift_layers"]
