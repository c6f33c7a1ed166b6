"""Fitting a probe: settings to an extractor, images to features, features to a head, all of it to a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import Labelled
from diffusers_repr.data.overlap import tell_overlap
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.noise_policy import validation_seed
from diffusers_repr.features.pooling import check_pooling, leaves_maps, pooled_size
from diffusers_repr.features.source import FeatureSource, is_source
from diffusers_repr.heads import MapClassifier, fit_head, fit_map_head
from diffusers_repr.heads.fitting.fit import FitResult, check_several_classes
from diffusers_repr.heads.fitting.maps import check_reads_once
from diffusers_repr.heads.fitting.protocols import Classifier, Protocol, classifier_class, get_protocol
from diffusers_repr.hub.places import public_name
from diffusers_repr.sweep.selection import Selection
from diffusers_repr.sweep.splits import refuse_one_class
from diffusers_repr.tasks.images import Inputs, class_data, move_inputs, pooled_features
from diffusers_repr.tasks.reading import Condition, open_source, reading_fields
from diffusers_repr.tasks.recipe import ProbeRecipe, Score


def fit_probe(
    source: FeatureSource,
    train: Any,
    validation: Any,
    *,
    pooling: str,
    requested: Any,
    seed: int,
    head: str,
    protocol: str | Protocol | None,
    head_options: Mapping[str, Any],
    condition: Condition,
    label_names: Sequence[str] | None,
    batch_size: int,
    base: tuple[str | None, str | None],
    progress_bar: Callable[..., Any] | None,
) -> tuple[Classifier, ProbeRecipe]:
    """The work of `Probe.fit`, which has the arguments' meaning.

    Args:
        source: Of the features.
        train: Labelled images.
        validation: Labelled images, or None.
        pooling: Of the features.
        requested: The timestep, or list of them, as the user gave it; None takes the source's.
        seed: Of fitting.
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
    check_reads_once(head)
    data, held, names = open_classes(train, validation, label_names)
    check_several_classes(data.targets)
    warn_of_absent(data, names)
    keys: list[str] = []
    held_keys: list[str] = []
    read = (pooling, batch_size, condition, progress_bar)
    features, output, size = pooled_features(source, data, *read, keys)
    device = source.denoiser.device if source.denoiser.device.type == "cuda" else torch.device("cpu")
    pair = None
    if held is not None:
        found = pooled_features(_for_validation(source, size), held, *read, held_keys)[0]
        pair = (move_inputs(found, device), held.targets)
        tell_overlap(keys, held_keys, str(data), str(held))
    learned = move_inputs(features, device), data.targets, len(names)
    generator = torch.Generator().manual_seed(seed)
    result = _fit(*learned, pair, head, chosen, generator, head_options, len(list(output.per_level())))
    scores = []
    if held is not None and result.validation_accuracy is not None:
        scores.append(Score("accuracy", result.validation_accuracy, public_name(held.name), held.split, len(held)))
    axis = -3 if leaves_maps(pooling) else -1
    sizes = {layer: feature.shape[axis] for layer, feature in output.features.items()}
    told = reading_fields(source, output, size, sizes, condition, base=base, requested=requested, seed=seed)
    recipe = ProbeRecipe(
        **{**told, "scores": tuple(scores)},
        label_names=tuple(names),
        pooling=pooling,
        protocol=result.protocol,
        train={"dataset": public_name(data.name), "split": data.split, "rows": len(data)},
    )
    return result.head, recipe


def _fit(
    inputs: Inputs,
    labels: Tensor,
    classes: int,
    validation: tuple[Any, Tensor] | None,
    head: str,
    protocol: Protocol,
    generator: torch.Generator,
    options: Mapping[str, Any],
    levels: int,
) -> FitResult:
    given: dict[str, Any] = {"head": head, "protocol": protocol, "generator": generator, **options}
    if isinstance(inputs, dict):
        return fit_map_head(inputs, labels, classes, levels=levels, validation=validation, **given)
    return fit_head(inputs, labels, classes, validation=validation, **given)


def warn_of_absent(data: Labelled, names: Sequence[str]) -> None:
    """Warn of classes without a training image."""
    there = set(data.targets.tolist())
    absent = [name for label, name in enumerate(names) if label not in there]
    if absent:
        warnings.warn(
            f"{', '.join(absent[:10])}{', ...' * (len(absent) > 10)}: {len(absent)} of {len(names)} classes have no "
            f"image in {data} and will not be predicted.",
            stacklevel=4,
        )


def _for_validation(source: FeatureSource, image_size: tuple[int, int]) -> FeatureSource:
    """The source with noise of its own for the images that are scored, at the size of those that were learned from."""
    if not isinstance(source, FeatureExtractor):
        return source
    seed = validation_seed(source.noise.policy, source.seed)
    return source.replace(seed=seed, image_size=image_size)


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


def make_source(
    source: Any, selection: Selection | None, use: str, settings: dict[str, Any], batch_size: int, head: str
) -> tuple[FeatureSource, str]:
    """The source that was given, or that of a denoiser or pipeline with these settings; and how it is pooled.

    If nothing is said, `mean` for heads on vectors, `map:16` for heads on maps.

    Raises:
        ValueError: If what to read is not said, said twice, or not pooled.
    """
    given, on_maps = is_source(source), issubclass(classifier_class(head), MapClassifier)
    usual = "map:16" if on_maps else "mean"
    if given and selection is not None:
        raise ValueError(f"Pass a {type(source).__name__} or a selection, not both.")
    pooled = None if not given or isinstance(source, FeatureExtractor) else settings.pop("pooling", usual)

    def make(denoiser: Denoiser, settings: dict[str, Any]) -> FeatureExtractor:
        if selection is not None:
            if "layers" in settings or "timestep" in settings:
                raise ValueError("The selection says which layers and timesteps; leave them out, or leave it out.")
            return selection.extractor(denoiser, use, **settings)
        for name in ("layers", "timestep"):
            if name not in settings:
                raise ValueError(f"Pass {name}=..., or selection=select_features(...).")
        return FeatureExtractor(denoiser, **{"pooling": usual, **settings})

    found = open_source(source, settings, "Probes", make)
    if isinstance(found, FeatureExtractor):
        found = found.replace(batch_size=batch_size) if found.batch_size is None else found
        found = found.replace(pooling=usual) if on_maps and found.pooling is None else found
        pooled = found.pooling
    if not on_maps:
        pooled_size(pooled)  # refuses maps
    elif not leaves_maps(check_pooling(pooled)):
        raise ValueError(
            f"pooling={pooled!r} leaves vectors, and {head!r} reads maps; take 'map:P', such as {usual!r}."
        )
    assert pooled is not None
    return found, pooled


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
