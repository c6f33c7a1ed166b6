"""Fitting a segmenter: settings to a source of features, images to maps, pixels to an ensemble, all to a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.label_column import check_ids
from diffusers_repr.data.masked import Masked, placed
from diffusers_repr.data.masks import black_and_white
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family_registry import family_of_or_base
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.presets import presets
from diffusers_repr.features.sampled_maps import SampledMaps, feature_maps
from diffusers_repr.features.source import FeatureSource, is_source
from diffusers_repr.heads import PixelEnsembleHead
from diffusers_repr.heads.fitting.pixels import MemberEnds, PixelProtocol, PixelSet, train_members
from diffusers_repr.hub.places import public_name
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.tasks.reading import Condition, bar_of, open_source, reading_fields
from diffusers_repr.tasks.recipe import SegmentationRecipe

# Those of DDPM-Seg's timesteps 50, 150 and 250 in the noise process of its networks, for any other process.
LEVELS = tuple(NoiseLevel(nsr=nsr) for nsr in (0.176, 0.522, 0.958))


def make_source(source: Any, preset: str | None, settings: dict[str, Any]) -> tuple[FeatureSource, Any]:
    """The source of features that was given, or that of a denoiser or pipeline with these settings.

    Layers, levels and noise that nobody names are those of a preset, or of DDPM-Seg as far as another network has
    them: the last residual block of every decoder stage, three levels, one noise for all images.

    Args:
        source: A `Denoiser`, a pipeline, a `FeatureExtractor` or another `FeatureSource`.
        preset: Name of `presets`.
        settings: Of `FeatureExtractor`, those that were given.

    Returns:
        The source, and the noise levels as they were asked for; None: those of the source.

    Raises:
        ValueError: For features that are pooled, and settings that another source does not have.
        TypeError: For what is no source.
    """
    if preset is not None and is_source(source):
        raise ValueError(f"preset={preset!r} makes a source of a model, and a source is given; leave one out.")
    requested = settings.get("timestep")

    def make(denoiser: Denoiser, settings: dict[str, Any]) -> FeatureExtractor:
        nonlocal requested
        paper = {} if preset is None else presets(preset).arguments()
        chosen = {"noise": "shared", "timestep": list(LEVELS), **paper, **settings}
        if "layers" not in chosen:
            family = family_of_or_base(denoiser.model)
            chosen["layers"] = list(family.default_layers("segmentation", denoiser.model).layers)
        requested = chosen["timestep"]
        return FeatureExtractor(denoiser, **chosen)

    made = open_source(source, settings, "Segmenters", make)
    pooling = getattr(made, "pooling", None)
    if pooling is not None:
        raise ValueError(f"pooling={pooling!r} leaves no place for pixels; leave it out, a segmenter reads maps.")
    return made, requested


def network_size(output: FeatureOutput) -> tuple[int, int]:
    """(H, W) of the images as the network saw them."""
    assert output.image_size is not None
    height, width = output.image_size
    return height, width


@dataclass(frozen=True)
class Read:
    """What is read of the training images.

    Attributes:
        maps: Their features.
        masks: `(N, H, W)` int64, at the network's size; -1 where there is no class.
        output: Of the last batch.
    """

    maps: SampledMaps
    masks: Tensor
    output: FeatureOutput


def read_images(
    source: FeatureSource,
    data: Masked,
    batch_size: int,
    condition: Condition,
    store_dtype: str,
    progress_bar: Callable[..., Any] | None,
) -> Read:
    """Features and masks of all images; memory holds their maps and one batch of images.

    Raises:
        ValueError: If images of several sizes come and the source keeps their size.
    """
    held: SampledMaps | None = None
    masks: list[np.ndarray] = []
    with bar_of(progress_bar, len(data)) as tell:
        for rows, images, found in data.batches(batch_size):
            output = source(images, prompt=condition[0], class_labels=condition[1])
            size = network_size(output)
            held = SampledMaps(size, store_dtype) if held is None else held
            if held.size != size:
                raise ValueError(
                    f"Image {rows[0]} of {data} is {size} (H, W), those before it are {held.size}; pass "
                    "image_size=(H, W) to resize them."
                )
            held.add(feature_maps(output, source.layers))
            for mask in found:
                ids = placed(mask, size).astype(np.int64)
                masks.append(np.where(ids == data.ignore_index, -1, ids) if data.ignore_index is not None else ids)
            tell(len(images))
    assert held is not None
    return Read(held, torch.from_numpy(np.stack(masks)), output)


def class_names(data: Masked, masks: Tensor) -> list[str]:
    """Names of the classes: those of the data, else its ids up to the largest.

    Raises:
        ValueError: Without a pixel of a class, and for ids too far apart to be classes.
    """
    present = masks.unique()
    present = present[present >= 0]
    if not len(present):
        raise ValueError(f"The masks of {data} have no pixel of a class; all are ignore_index={data.ignore_index}.")
    hint = black_and_white(present.tolist(), False, data.ignore_index)
    if hint and data.label_names is None:
        raise ValueError(f"The masks of {data} have the class ids 0 and 255.{hint}")
    if data.label_names is not None:
        return list(data.label_names)
    check_ids(present.numpy(), f"The masks of {data}")
    return [str(number) for number in range(int(present.max()) + 1)]


def learnable(masks: Tensor, names: Sequence[str], min_pixels: int, data: Masked) -> Tensor:
    """The masks without the classes that are too small in an image, -1 there; warns of classes that are not there.

    Args:
        masks: `(N, H, W)`, -1 where there is no class.
        names: Of the classes.
        min_pixels: A class of fewer pixels in an image is left out of it.
        data: For messages.

    Raises:
        ValueError: If fewer than two classes are left.
    """
    kept = masks.clone()
    for mask in kept:
        ids, counts = mask.unique(return_counts=True)
        for small in ids[(counts < min_pixels) & (ids >= 0)].tolist():
            mask[mask == small] = -1
    before, left = ({int(i) for i in m.unique() if i >= 0} for m in (masks, kept))
    if len(left) < 2:
        told = ", ".join(repr(names[i]) for i in sorted(left)) or "none"
        small = f" ({len(before - left)} more cover fewer than {min_pixels} pixels of an image)" * bool(before - left)
        hint = black_and_white(before, bool((masks < 0).any()), data.ignore_index)
        raise ValueError(
            f"The masks of {data} show {told} of {len(names)} classes{small}; a segmenter needs two.{hint}"
        )
    absent = [name for i, name in enumerate(names) if i not in left]
    if absent:
        why = f" Of them {', '.join(names[i] for i in sorted(before - left))} cover fewer than {min_pixels} pixels."
        warnings.warn(
            f"{', '.join(absent[:10])}{', ...' * (len(absent) > 10)}: {len(absent)} of {len(names)} classes are on no "
            f"training mask and will not be predicted.{why * bool(before - left)}",
            stacklevel=5,
        )
    return kept


def train_ensemble(
    read: Read,
    kept: Tensor,
    layers: Sequence[str],
    classes: int,
    members: int,
    hidden_features: Sequence[int] | None,
    protocol: PixelProtocol,
    seed: int,
    device: torch.device,
    progress_bar: Callable[..., Any] | None,
) -> tuple[PixelEnsembleHead, MemberEnds]:
    """A head for what was read, trained on all pixels with a class."""
    levels = len(list(read.output.per_level()))
    channels = [read.output.as_map(layer).shape[-3] for layer in layers]
    with torch.random.fork_rng(devices=[]):
        head = PixelEnsembleHead(list(layers), channels, classes, levels, members, hidden_features)
    places = (kept >= 0).nonzero()
    pixels = PixelSet(read.maps, places, kept[tuple(places.unbind(1))])
    return head, train_members(head.to(device), pixels, protocol, seed, progress_bar)


def make_recipe(
    source: FeatureSource,
    data: Masked,
    read: Read,
    names: Sequence[str],
    protocol: dict[str, Any],
    condition: Condition,
    base: tuple[str | None, str | None],
    requested: Any,
    seed: int,
) -> SegmentationRecipe:
    """Everything between an image and the head."""
    sizes = {layer: read.output.as_map(layer).shape[-3] for layer in source.layers}
    resize = "bicubic, antialiased, aspect ratio not kept; masks from the nearest pixel"
    told = reading_fields(
        source, read.output, read.maps.size, sizes, condition, base=base, requested=requested, seed=seed, resize=resize
    )
    return SegmentationRecipe(
        **told,
        label_names=tuple(names),
        protocol=protocol,
        train={"dataset": public_name(data.name), "split": data.split, "rows": len(data)},
        ignore_index=data.ignore_index,
    )


__all__ = [
    "LEVELS",
    "Read",
    "class_names",
    "learnable",
    "make_recipe",
    "make_source",
    "network_size",
    "read_images",
    "train_ensemble",
]
