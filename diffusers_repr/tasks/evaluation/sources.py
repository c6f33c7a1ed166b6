"""Feature sources by name, for recipes: each a function from a base and settings to what a task is fitted on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import cleandift_extractor
from diffusers_repr.features.pixel_source import PixelSource
from diffusers_repr.heads import Hyperfeatures

Sides = int | list[int] | str | None


class Reading(NamedTuple):
    """What a task is fitted on, and further settings of fitting it.

    Attributes:
        source: A `Denoiser`, whose features the settings tell, or a `FeatureSource`.
        settings: Of `FeatureExtractor`.
    """

    source: Any
    settings: dict[str, Any]


SourceMaker = Callable[..., Reading]
_SOURCES: dict[str, SourceMaker] = {}


def register_source(name: str) -> Callable[[SourceMaker], SourceMaker]:
    """Make a source known by a name.

    Args:
        name: What a recipe calls it. The function takes the base, a `Denoiser`, and keyword-only arguments with type
            hints, which are the keys of the recipe's section `source`.

    Raises:
        ValueError: If the name is taken.
    """

    def add(make: SourceMaker) -> SourceMaker:
        if name in _SOURCES:
            raise ValueError(f"register_source({name!r}): there is one of this name. Choose another.")
        _SOURCES[name] = make
        return make

    return add


def unregister_source(name: str) -> None:
    """Forget a source."""
    del _SOURCES[name]


def list_sources() -> dict[str, SourceMaker]:
    """The sources by name.

    Example:
        >>> list(list_sources())
        ['cleandift', 'ensemble', 'hyperfeatures', 'pixels', 'plain']
    """
    return dict(sorted(_SOURCES.items()))


def find_source(name: str) -> SourceMaker:
    """The source of a name.

    Raises:
        ValueError: With the names there are.
    """
    if name not in _SOURCES:
        raise ValueError(
            f"Unknown source {name!r}; expected one of {', '.join(list_sources())}. `register_source` adds one of "
            "your own."
        )
    return _SOURCES[name]


def sides(image_size: Sides) -> Any:
    """`image_size` of Python from that of a recipe: a side, two of them, or `keep`.

    Raises:
        ValueError: For anything else.
    """
    if isinstance(image_size, list):
        if len(image_size) != 2 or not all(isinstance(side, int) for side in image_size):
            raise ValueError(f"image_size is one side, height and width, or keep; got {image_size}.")
        return tuple(image_size)
    if isinstance(image_size, str) and image_size != "keep":
        raise ValueError(f"image_size is one side, height and width, or keep; got {image_size!r}.")
    return image_size


@register_source("plain")
def plain(
    base: Denoiser,
    *,
    layers: str | list[str] | None = None,
    timesteps: float | list[float] | None = None,
    noise: str | list[str] | None = None,
    ensemble_size: int | None = None,
    image_size: int | list[int] | str | None = None,
    where: str | None = None,
    sample_posterior: bool | str | None = None,
) -> Reading:
    """Layers of the base at noise levels, by `FeatureExtractor`; what is not told is as the task does by itself.

    Args:
        base: The model.
        layers: Full module paths.
        timesteps: Levels; larger is noisier.
        noise: Policy.
        ensemble_size: Noise draws an image.
        image_size: One side, height and width, or `keep`.
        where: As in `FeatureExtractor`.
        sample_posterior: Likewise.
    """
    steps = _whole(timesteps) if timesteps is not None else None
    given = {
        "layers": layers,
        "timestep": steps,
        "noise": noise,
        "ensemble_size": ensemble_size,
        "image_size": sides(image_size),
        "where": where,
        "sample_posterior": sample_posterior,
    }
    return Reading(base, {name: value for name, value in given.items() if value is not None})


@register_source("ensemble")
def ensemble(
    base: Denoiser,
    *,
    ensemble_size: int = 8,
    layers: str | list[str] | None = None,
    timesteps: float | list[float] | None = None,
    noise: str | None = None,
    image_size: int | list[int] | str | None = None,
    sample_posterior: bool | str | None = None,
) -> Reading:
    """As `plain`, the mean over several noise draws (DIFT takes 8).

    Args:
        base: The model.
        ensemble_size: Noise draws an image.
        layers: Full module paths.
        timesteps: Levels; larger is noisier.
        noise: Policy.
        image_size: One side, height and width, or `keep`.
        sample_posterior: As in `FeatureExtractor`.
    """
    return plain(
        base, layers=layers, timesteps=timesteps, noise=noise, ensemble_size=ensemble_size, image_size=image_size,
        sample_posterior=sample_posterior,
    )  # fmt: skip


@register_source("hyperfeatures")
def hyperfeatures(base: Denoiser, *, head: str, image_size: int | list[int] | str | None = None) -> Reading:
    """The map of a trained `HyperfeaturesHead`.

    Args:
        base: The head's.
        head: Folder or Hub id that training wrote.
        image_size: One side, height and width, or `keep`.
    """
    return Reading(Hyperfeatures.from_pretrained(head, base, image_size=sides(image_size)), {})


@register_source("cleandift")
def cleandift(
    base: Denoiser, *, layers: str | list[str] | None = None, image_size: int | list[int] | str | None = None
) -> Reading:
    """Layers of the clean image, of a base that CleanDIFT tuned.

    Args:
        base: The tuned model: its folder is the recipe's base.
        layers: Full module paths; all that were aligned if none is told.
        image_size: One side, height and width, or `keep`.
    """
    if base.name is None:
        raise ValueError("CleanDIFT's features are of a network that was tuned; there is none to take untrained.")
    tuned = cleandift_extractor(base.name, layers, revision=base.revision, image_size=sides(image_size))
    return Reading(tuned, {})


@register_source("pixels")
def pixels(
    base: Denoiser,
    *,
    patch: int = 1,
    places: bool = False,
    centred: bool = False,
    image_size: int | list[int] | str | None = None,
) -> Reading:
    """Raw pixels, see `PixelSource`; the base tells their channels and size, and its network is not run.

    Args:
        base: Any model of such images.
        patch: Side of the square of pixels around each.
        places: Add where a pixel lies.
        centred: Take away the mean of each patch.
        image_size: One side, height and width, or `keep`.
    """
    return Reading(PixelSource(base, patch, places=places, centred=centred, image_size=sides(image_size)), {})


def _whole(timesteps: float | list[float]) -> Any:
    """Timesteps as given, whole ones as int; one of them alone where one was told."""
    given = timesteps if isinstance(timesteps, list) else [timesteps]
    found = [int(value) if float(value).is_integer() else value for value in given]
    return found if isinstance(timesteps, list) and len(found) > 1 else found[0]


__all__ = ["Reading", "find_source", "list_sources", "register_source", "unregister_source"]
