"""How a task reads features of images: from which source, and what its recipe keeps of that."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.source import FeatureSource, is_source, require_source
from diffusers_repr.hub.base_record import Level
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.tasks.base import record_base
from diffusers_repr.tasks.levels import PACKAGES, recorded_levels
from diffusers_repr.tasks.recipe import FeatureRecipe

Condition = tuple[str | None, int | None]  # prompt and class label of every image


def open_source(
    source: Any, settings: Mapping[str, Any], who: str, make: Callable[[Denoiser, dict[str, Any]], FeatureSource]
) -> FeatureSource:
    """The source of features that was given, with these settings, or one that is made of a model.

    Args:
        source: A `Denoiser`, a diffusers pipeline, a `FeatureExtractor` or another `FeatureSource`.
        settings: Of `FeatureExtractor`, those that were given; of another source `seed` alone, which is of fitting.
        who: What reads, for messages, such as `Probes`.
        make: From a denoiser and the settings to a source.

    Raises:
        ValueError: For settings that another source does not have, and for networks of videos.
        TypeError: For what is no source.
    """
    if isinstance(source, FeatureExtractor):
        made: FeatureSource = source.replace(**settings)
    elif is_source(source):
        others = [name for name in settings if name != "seed"]
        if others:
            raise ValueError(f"{', '.join(others)} are settings of a model; {type(source).__name__} has its own.")
        made = require_source(source)
    else:
        made = make(source if isinstance(source, Denoiser) else Denoiser.from_pipe(source), dict(settings))
    require_images(made.denoiser, who)
    return made


def seed_of(source: FeatureSource, settings: Mapping[str, Any]) -> int:
    """The seed of fitting: that of the noise, or what was given beside a source that draws none."""
    own = getattr(source, "seed", 0)
    return own if isinstance(source, FeatureExtractor) else settings.get("seed", own)


def resize_of(source: FeatureSource) -> tuple[int, int] | None:
    """(H, W) to which a source brings images, as `to_pixels` takes it: None if they keep theirs."""
    return None if source.image_size == "keep" else source.image_size


def check_source(recipe: FeatureRecipe, source: FeatureSource | None) -> None:
    """Refuse a source that is not the recipe's.

    Raises:
        ValueError: If the recipe needs one that is not given, or the given one has other layers.
    """
    if source is None and recipe.foreign is not None:
        raise ValueError(
            f"This {recipe.NOUN} was fitted on features of a {recipe.foreign}, which its recipe does not hold: pass "
            "it, source=..."
        )
    if source is not None and list(source.layers) != list(recipe.layers):
        raise ValueError(
            f"This {recipe.NOUN} reads {list(recipe.layers)} of a {recipe.foreign or 'FeatureExtractor'}; the source "
            f"({type(source).__name__}) gives {list(source.layers)}. Pass the one it was fitted on."
        )


def reading_fields(
    source: FeatureSource,
    output: FeatureOutput,
    image_size: tuple[int, int],
    sizes: Mapping[str, int],
    condition: Condition,
    *,
    base: tuple[str | None, str | None] = (None, None),
    requested: Any = None,
    seed: int = 0,
    resize: str = "bicubic, antialiased, aspect ratio not kept",
) -> dict[str, Any]:
    """The fields of a `FeatureRecipe`.

    Args:
        source: Of the features.
        output: Of some images.
        image_size: (H, W) of images as the network sees them.
        sizes: Layer -> values of its feature.
        condition: Prompt and class label of every image.
        base: Name and revision to write instead of those the model was loaded from.
        requested: The timestep, or list of them, as the user gave it; None takes the source's.
        seed: Of the noise and of fitting.
        resize: How images come to that size, in words.
    """
    plain, own = isinstance(source, FeatureExtractor), cast(Any, source)
    levels = [level for level, _ in output.per_level()]
    return {
        "base": record_base(source.denoiser, sizes, *base),
        "layers": tuple(source.layers),
        "levels": recorded_levels(levels, requested) if plain else tuple(map(_level, levels)),
        "where": own.where if plain else "output",
        "noise": own.noise.policy if plain else "clean",
        "seed": seed,
        "ensemble_size": own.ensemble_size if plain else 1,
        "image_size": image_size,
        "preprocessing": {"resize": resize, "channels": source.denoiser.image_channels, "range": [-1, 1]},
        "sample_posterior": own.sample_posterior if plain else False,
        "prompt": condition[0],
        "class_labels": condition[1],
        "scores": (),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "source": None if plain else type(source).__name__,
    }


def _level(level: NoiseLevel) -> Level:
    time = float(level.timestep) if level.timestep is not None else 0.0
    return Level({"timestep": time}, time, float(level.nsr) if level.nsr is not None else 0.0)


def texts_of(prompt: str | Sequence[str] | None, count: int) -> Callable[[slice], Any]:
    """Prompts of a part of some images: one for all of them, or each its own.

    Raises:
        ValueError: For another number of prompts than images.
    """
    if isinstance(prompt, (str, type(None))):
        return lambda rows: prompt
    if len(prompt) != count:
        raise ValueError(f"{len(prompt)} prompts for {count} images; pass 1 or {count}.")
    return lambda rows: list(prompt)[rows]


@contextmanager
def bar_of(progress_bar: Callable[..., Any] | None, total: int) -> Iterator[Callable[[int], None]]:
    """Inside, a function that tells a bar of further images.

    Args:
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`; None: nothing is told.
        total: Of images.
    """
    bar = None if progress_bar is None else progress_bar(total=total)
    try:
        yield (lambda count: None) if bar is None else bar.update
    finally:
        if bar is not None:
            bar.close()


__all__ = [
    "Condition",
    "bar_of",
    "check_source",
    "open_source",
    "reading_fields",
    "resize_of",
    "seed_of",
    "texts_of",
]
