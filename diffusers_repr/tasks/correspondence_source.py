"""Which layer, level and size correspondence reads of a model: a paper's choice, one's own, or a default of ours."""

from __future__ import annotations

import re
import warnings
from typing import Any, NamedTuple

from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.default_layers import STACKS
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.presets import Preset, find_preset
from diffusers_repr.noise import LevelLike, NoiseLevel

_LEVEL = 0.725  # noise to signal of DIFT's timestep 261 of Stable Diffusion
_MEMBERS = 8


class ChosenSource(NamedTuple):
    """A feature source, and the prompt that goes with it (None: the empty one)."""

    source: FeatureExtractor
    prompt: str | None


def correspondence_source(
    denoiser: Denoiser,
    layer: str | None = None,
    timestep: LevelLike | None = None,
    preset: str | Preset | None = None,
    **settings: Any,
) -> ChosenSource:
    """The features that correspondence compares, of any model.

    Without anything chosen: DIFT's setting for SPair-71k where the model is Stable Diffusion 1 or 2 or ADM's 256 px
    network; else, with a warning, a place of ours: the decoder's second stage of three or more, the middle block of a
    transformer, at the noise-to-signal ratio of DIFT's level, an ensemble of 8. `select_features(..., metric="pck")`
    finds a better one on pairs of yours.

    Args:
        denoiser: Any model of images.
        layer: Full path of a layer.
        timestep: Training timestep or `NoiseLevel`; larger is noisier.
        preset: `dift`, `dift-hpatches`, `dift-davis`, `cleandift`, ..., by the model's architecture; or a `Preset`.
        **settings: Of `FeatureExtractor`, over those of the preset.

    Raises:
        ValueError: For a preset that the architecture does not have, or that reads several layers.
    """
    chosen: Preset | None = preset if isinstance(preset, Preset) else None
    if isinstance(preset, str):
        chosen = find_preset(preset, denoiser)
    elif preset is None and (layer is None or timestep is None):
        chosen = _published(denoiser)
    arguments: dict[str, Any] = {} if chosen is None else chosen.arguments()
    if layer is None and chosen is None:
        layer = middle_layer(denoiser)
        warnings.warn(
            f"No paper names a layer of a {type(denoiser.model).__name__} like this for correspondence; {layer!r} at "
            f"the noise of DIFT is read. `select_features(denoiser, pairs, None, timesteps, metric='pck')` finds what "
            "suits your images.",
            stacklevel=3,
        )
    arguments |= {} if layer is None else {"layers": [layer]}
    if chosen is None:
        arguments |= {"timestep": NoiseLevel(nsr=_LEVEL), "ensemble_size": _MEMBERS}
    arguments |= {} if timestep is None else {"timestep": timestep}
    if settings.get("noise") == "clean":
        arguments |= {"ensemble_size": 1, "sample_posterior": False}
    source = FeatureExtractor(denoiser, **{**arguments, **settings})
    return ChosenSource(source, None if chosen is None else chosen.prompt)


def middle_layer(denoiser: Denoiser) -> str:
    """The layer that is read where no paper names one.

    Of a U-Net the output of the decoder's second stage, as DIFT's; of the first where there are two stages. Of a
    transformer the block in the middle.
    """
    paths = [layer.path for layer in list_layers(denoiser)]
    stages = [path for path in paths if re.fullmatch(r"up_blocks\.\d+", path)]
    if stages:
        return stages[1] if len(stages) > 2 else stages[0]
    blocks = [path for path in paths if re.fullmatch(rf"({'|'.join(STACKS)})\.\d+", path)] or paths
    return blocks[len(blocks) // 2]


def _published(denoiser: Denoiser) -> Preset | None:
    try:
        return find_preset("dift", denoiser)
    except ValueError:
        return None


__all__ = ["ChosenSource", "correspondence_source", "middle_layer"]
