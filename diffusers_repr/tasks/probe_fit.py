"""Fitting a probe: settings to an extractor, images to features, features to a head, all of it to a recipe."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffusers_repr.data.labelled import Labelled
from diffusers_repr.data.overlap import tell_overlap
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.noise_policy import validation_seed
from diffusers_repr.features.pooling import pooled_size
from diffusers_repr.heads import PooledHead, fit_head
from diffusers_repr.heads.fitting.protocols import Protocol, get_protocol
from diffusers_repr.hub.places import public_name
from diffusers_repr.sweep.selection import Selection
from diffusers_repr.sweep.splits import refuse_one_class
from diffusers_repr.tasks.base import record_base
from diffusers_repr.tasks.images import class_data, pooled_features
from diffusers_repr.tasks.levels import PACKAGES, recorded_levels
from diffusers_repr.tasks.recipe import ProbeRecipe, Score


def fit_probe(
    extractor: FeatureExtractor,
    train: Any,
    validation: Any,
    *,
    requested: Any,
    head: str,
    protocol: str | Protocol | None,
    head_options: Mapping[str, Any],
    condition: tuple[str | None, int | None],
    label_names: Sequence[str] | None,
    batch_size: int,
    base: tuple[str | None, str | None],
    progress_bar: Callable[..., Any] | None,
) -> tuple[PooledHead, ProbeRecipe]:
    """The work of `Probe.fit`, which has the arguments' meaning.

    Args:
        extractor: Of the features.
        train: Labelled images.
        validation: Labelled images, or None.
        requested: The timestep, or list of them, as the user gave it; None takes the extractor's.
        head: Kind of head.
        protocol: How it is fitted.
        head_options: Arguments of the head's class.
        condition: Prompt and class label of every image.
        label_names: Name of each class.
        batch_size: Images read at a time.
        base: Name and revision to write instead of those the model was loaded from.
        progress_bar: Makes a bar.
    """
    chosen = get_protocol(protocol, head)
    data, held, names = open_classes(train, validation, label_names)
    keys: list[str] = []
    held_keys: list[str] = []
    read = (batch_size, *condition, progress_bar)
    features, output, size = pooled_features(extractor, data, *read, keys)
    extractor = extractor.replace(image_size=size)
    device = extractor.denoiser.device if extractor.denoiser.device.type == "cuda" else torch.device("cpu")
    pair = None
    if held is not None:
        other = extractor.replace(seed=validation_seed(extractor.noise.policy, extractor.seed))
        pair = (pooled_features(other, held, *read, held_keys)[0].to(device), held.targets)
        tell_overlap(keys, held_keys, str(data), str(held))
    result = fit_head(
        features.to(device),
        data.targets,
        len(names),
        head=head,
        protocol=chosen,
        validation=pair,
        generator=torch.Generator().manual_seed(extractor.seed),
        **head_options,
    )
    scores = []
    if held is not None and result.validation_accuracy is not None:
        scores.append(Score("accuracy", result.validation_accuracy, public_name(held.name), held.split, len(held)))
    sizes = {layer: feature.shape[-1] for layer, feature in output.features.items()}
    assert extractor.pooling is not None
    recipe = ProbeRecipe(
        base=record_base(extractor.denoiser, sizes, *base),
        layers=tuple(extractor.layers),
        levels=recorded_levels(extractor.levels, requested),
        label_names=tuple(names),
        where=extractor.where,
        noise=extractor.noise.policy,
        seed=extractor.seed,
        ensemble_size=extractor.ensemble_size,
        pooling=extractor.pooling,
        image_size=size,
        preprocessing={
            "resize": "bicubic, antialiased, aspect ratio not kept",
            "channels": extractor.denoiser.image_channels,
            "range": [-1, 1],
        },
        sample_posterior=extractor.sample_posterior,
        prompt=condition[0],
        class_labels=condition[1],
        protocol=result.protocol,
        train={"dataset": public_name(data.name), "split": data.split, "rows": len(data)},
        scores=tuple(scores),
        versions={name: importlib.metadata.version(name) for name in PACKAGES},
    )
    return result.head, recipe


def open_classes(
    train: Any, validation: Any = None, label_names: Sequence[str] | None = None
) -> tuple[Labelled, Labelled | None, list[str]]:
    """Both splits with class ids, checked, and the name of each class; no image is read.

    Args:
        train: As for `Probe.fit`.
        validation: As for `Probe.fit`.
        label_names: As for `Probe.fit`.

    Raises:
        ValueError, TypeError: For data or labels that a probe cannot learn from, or be scored on.
    """
    data = class_data(train, "train")
    held = None if validation is None else class_data(validation, "validation")
    names = _names(data, held, label_names)
    if held is not None:
        refuse_one_class(held.targets, str(held))
    return data, held, names


def make_extractor(source: Any, selection: Selection | None, use: str, settings: dict[str, Any]) -> FeatureExtractor:
    """The extractor of a denoiser, pipeline or extractor with these settings.

    Raises:
        ValueError: If what to read is not said, said twice, or not pooled.
    """
    if isinstance(source, FeatureExtractor):
        if selection is not None:
            raise ValueError("Pass a FeatureExtractor or a selection, not both.")
        extractor = source.replace(**settings)
    else:
        denoiser = source if isinstance(source, Denoiser) else Denoiser.from_pipe(source)
        if selection is not None:
            if "layers" in settings or "timestep" in settings:
                raise ValueError("The selection says which layers and timesteps; leave them out, or leave it out.")
            extractor = selection.extractor(denoiser, use, **settings)
        else:
            for name in ("layers", "timestep"):
                if name not in settings:
                    raise ValueError(f"Pass {name}=..., or selection=select_features(...).")
            extractor = FeatureExtractor(denoiser, **{"pooling": "mean", **settings})
    require_images(extractor.denoiser, "Probes")
    pooled_size(extractor.pooling)  # refuses maps
    return extractor


def _names(data: Labelled, held: Labelled | None, given: Sequence[str] | None) -> list[str]:
    if given is None:
        data.check_classes()
    classes = int(data.targets.max()) + 1
    names = list(given) if given is not None else data.label_names or [str(i) for i in range(classes)]
    if len(set(names)) < len(names):
        raise ValueError(f"label_names must differ; got {names}.")
    for found in (data, *([] if held is None else [held])):
        check_labels(found, names)
    return names


def check_labels(data: Labelled, names: Sequence[str]) -> None:
    """Raise ValueError unless the labels are ids of `names`, and the data's own names are the same."""
    low, high = int(data.targets.min()), int(data.targets.max())
    if low < 0 or high >= len(names):
        raise ValueError(f"Labels of {data} run from {low} to {high}; class ids run from 0 to {len(names) - 1}.")
    if data.label_names is not None and list(data.label_names) != list(names):
        raise ValueError(
            f"{data} has the classes {list(data.label_names)}; the probe has {list(names)}. "
            "Bring them to the same names in the same order."
        )
