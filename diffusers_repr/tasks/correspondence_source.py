"""Which layer, level and size correspondence reads of a model: a paper's choice, one's own, or a default of ours."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.default_layers import STACKS
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.features.presets import Preset, find_preset
from diffusers_repr.features.source import FeatureSource, is_source
from diffusers_repr.metrics.pck import PCKReference
from diffusers_repr.noise import LevelLike, NoiseLevel
from diffusers_repr.sweep import PCKMeasure, select_features
from diffusers_repr.tasks.reading import open_source, reading_fields, seed_of
from diffusers_repr.tasks.recipe import MatcherRecipe

_LEVEL = 0.725  # noise to signal of DIFT's timestep 261 of Stable Diffusion
_MEMBERS = 8
_GREY = (64, 64)  # pixels of an image of a model that tells no size of its own


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


def choose_source(
    given: Any,
    pairs: Any,
    settings: Mapping[str, Any],
    alpha: float,
    reference: PCKReference,
    prompt: str | None,
    class_labels: int | None,
) -> tuple[FeatureSource, str | None]:
    """The source that was given, that of a model with these settings, or the best one on pairs by PCK.

    Args:
        given: A `Denoiser`, a diffusers pipeline, a `FeatureExtractor` or another `FeatureSource`.
        pairs: To choose on; None: nothing is chosen.
        settings: Of `FeatureExtractor`, and `preset`. With pairs, `layers` and `timestep` are those to choose from,
            and `noise` may be a list of policies.
        alpha: Of the PCK.
        reference: Likewise.
        prompt: Of every image; the preset's if None.
        class_labels: Likewise.

    Returns:
        The source, and the prompt that goes with it.

    Raises:
        ValueError: For pairs with a source whose layer and level are its own, and without levels to choose from.
    """
    own = dict(settings)
    preset = own.pop("preset", None)
    if pairs is None:
        told: list[str | None] = [None]

        def make(denoiser: Denoiser, settings: dict[str, Any]) -> FeatureSource:
            layers = settings.pop("layers", None)
            layer = layers if isinstance(layers, (str, type(None))) else next(iter(layers))
            found = correspondence_source(denoiser, layer, settings.pop("timestep", None), preset, **settings)
            told[0] = found.prompt
            return found.source

        if preset is not None and is_source(given):
            raise ValueError(f"preset={preset!r} makes a source of a model, and a source is given; leave one out.")
        return open_source(given, own, "Correspondence", make), told[0]
    if is_source(given) or preset is not None:
        what = f"preset={preset!r}" if preset is not None else type(given).__name__
        raise ValueError(f"{what} has a layer and a level of its own; leave out the pairs to choose on, or it.")
    levels = own.pop("timestep", None)
    if levels is None:
        raise ValueError("Pairs to choose on need levels to choose from: timestep=[50, 200].")
    denoiser = given if isinstance(given, Denoiser) else Denoiser.from_pipe(given)
    noise = own.pop("noise", "per_image")
    members, seed, batch_size = own.pop("ensemble_size", 1), own.pop("seed", 0), own.pop("batch_size", None)
    found = select_features(
        denoiser,
        pairs,
        None,
        levels if isinstance(levels, (list, tuple, range)) else [levels],
        own.pop("layers", None),
        metric=PCKMeasure("pck", alpha=alpha, reference=reference),
        noise=noise,
        batch_size=batch_size or 8,
        prompt=prompt,
        class_labels=class_labels,
        seeds=(seed,),
        image_size=own.pop("image_size", None),
        progress=False,
    )
    own["ensemble_size"] = 1 if found.best.noise == "clean" else members
    return found.extractor(denoiser, seed=seed, batch_size=batch_size, **own), prompt


def matcher_recipe(source: FeatureSource, layer: str, condition: tuple[str | None, int | None]) -> MatcherRecipe:
    """The recipe of correspondence by one layer of a source, which reads a grey image for it.

    Args:
        source: Of the features.
        layer: One of its layers.
        condition: Prompt and class label of every image.
    """
    denoiser, size = source.denoiser, source.image_size
    sides = (denoiser.resize_to() or _GREY) if size == "keep" else size
    grey = torch.full((1, denoiser.image_channels, *sides), 0.5)
    reader = source.replace(layers=[layer], ensemble_size=1) if isinstance(source, FeatureExtractor) else source
    output = reader(grey, class_labels=condition[1])
    fields = reading_fields(source, output, (0, 0), {layer: output.as_map(layer).shape[-3]}, condition)
    told = {"layers": (layer,), "image_size": size, "seed": seed_of(source, {}), "chosen_on": None}
    resize = "not at all" if size == "keep" else fields["preprocessing"]["resize"]
    preprocessing = {**fields["preprocessing"], "resize": resize}
    return MatcherRecipe(**{**fields, **told, "preprocessing": preprocessing})


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


__all__ = ["ChosenSource", "choose_source", "correspondence_source", "matcher_recipe", "middle_layer"]
