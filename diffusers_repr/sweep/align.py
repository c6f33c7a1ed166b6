"""A sweep over layers and noise levels: how close is a denoiser's representation to an encoder's?"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import open_images, open_labelled
from diffusers_repr.data.overlap import tell_overlap
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.record import base_record
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.encoders import Encoder
from diffusers_repr.features.noise_policy import check_policy
from diffusers_repr.heads.fitting.protocols import Protocol, get_protocol
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.metrics.encoding import SharedRead, Which, check_which, pick
from diffusers_repr.noise import LevelLike, NoiseLevel
from diffusers_repr.sweep.alignment import Alignment, AlignmentCell
from diffusers_repr.sweep.grid import SweepGrid, resolve_layers, resolve_levels
from diffusers_repr.sweep.measure import Bench, CellScore, Key, Measure, Split, make_measure
from diffusers_repr.sweep.progress import Progress, SweepBar
from diffusers_repr.sweep.run import Sweep

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the noise range, where no levels are given


def measure_alignment(
    denoiser: Denoiser,
    encoder: Encoder,
    data: Any,
    timesteps: Sequence[LevelLike] | None = None,
    layers: Sequence[str] | str | None = None,
    *,
    metrics: Sequence[str | Measure] | str | Measure = ("cknna",),
    k: int = 10,
    samples: int | None = None,
    features: Which = "tokens",
    test: Any = None,
    protocol: str | Protocol = "ridge",
    knn_k: int = 20,
    symmetric: bool = True,
    clamp_quantile: float | None = None,
    noise: str = "per_image",
    seed: int = 0,
    prompt: str | None = None,
    class_labels: int | None = None,
    image_size: ImageSize = None,
    batch_size: int = 64,
    memory_gib: float = 4.0,
    progress: Progress = False,
) -> Alignment:
    """Score every layer of a denoiser at every noise level against an encoder, on the same images.

    One forward an image and level serves all layers and all metrics. Features are means over positions (text tokens
    left out), the condition is the null one unless another is given, and noise depends on the seed and the image
    alone: what REPA's authors report (arXiv 2410.06940). Under `accelerate launch` the processes share images and
    scoring.

    Args:
        denoiser: The model.
        encoder: What to compare with; `Encoder.from_denoiser` compares with a layer of a denoiser.
        data: Images (`ImageData`, a `datasets.Dataset`, a list, array or tensor), or `(images, labels)`.
        timesteps: Levels; five over the training range if None. Larger is noisier.
        layers: Full module paths; those of `list_layers(denoiser)` if None.
        metrics: Of `cknna`, `cka` (unbiased) and, on labelled data, `linear` and `knn`, or any other registered
            `Measure`, or one of your own; the first decides `best`.
        k: Neighbours of CKNNA.
        samples: As many images, drawn by the seed; all if None. Scores of unequal numbers do not compare.
        features: The encoder's: `tokens` (their mean) or `global`.
        test: Labelled images on which probes are measured.
        protocol: Of the linear probe; see `linear_probe`.
        knn_k: Neighbours of the vote.
        symmetric: As in `cknna`.
        clamp_quantile: As in `cknna` and `cka`.
        noise: `per_image`, `shared`, `fresh` or `clean`, as in `FeatureExtractor`.
        seed: Of the noise, the choice of samples and the probes.
        prompt: One for all images instead of the null condition.
        class_labels: One class id for all images instead of the null class.
        image_size: As in `FeatureExtractor`: the model's own size if None; `"keep"` for the images'.
        batch_size: Images a forward.
        memory_gib: Features held at a time; beyond it, levels, then layers, are read one after another.
        progress: Show a bar; or a function that is called with the share that is done, in [0, 1].

    Raises:
        ValueError, TypeError: For layers, levels, metrics, images or labels that do not fit; before the first forward
            where that can be known.
        FloatingPointError: If a layer gives NaN or infinity; names it.
    """
    require_images(denoiser, "Alignment")
    if not isinstance(encoder, Encoder):
        raise TypeError(f"encoder must be an Encoder; got {type(encoder).__name__}. See Encoder.from_pretrained.")
    measures = make_measures(
        metrics,
        k=k,
        knn_k=knn_k,
        protocol=get_protocol(protocol, "linear"),
        symmetric=symmetric,
        clamp_quantile=clamp_quantile,
        seed=seed,
    )
    check_which(features)
    splits = open_compared(measures, data, test, samples, seed)
    condition = {"prompt": prompt, "class_labels": class_labels}

    def encode(pixels: Tensor) -> Tensor:
        return pick(encoder.encode_pixels(pixels), features)

    found = sweep_denoiser(
        denoiser,
        measures,
        splits,
        encode,
        resolve_timesteps(denoiser, timesteps),
        layers,
        noise=noise,
        seed=seed,
        condition=condition,
        image_size=image_size,
        batch_size=batch_size,
        memory_gib=memory_gib,
        progress=progress,
    )
    warn_undefined(found.scores)
    names = tuple(measure.name for measure in measures)
    recipe = {
        **_recipe(denoiser, encoder, splits, found.reads, found.size),
        "features": features,
        "noise": noise,
        "sample_posterior": False,
        "seed": seed,
        "k": k,
        "settings": {measure.name: measure.describe() for measure in measures},
        **condition,
    }
    recipe = json.loads(json.dumps(recipe))  # lists for tuples, as it will be read back
    return Alignment(_cells(found.grid, found.scores, names), names, found.bench.reference_scores, recipe)


@dataclass(frozen=True)
class Swept:
    """What a sweep over one denoiser found.

    Attributes:
        grid: Its cells.
        scores: Of every cell, by the name of the measure.
        bench: With the features that were compared with.
        reads: What is known of the images of each split.
        size: (H, W) of the images as they were read.
    """

    grid: SweepGrid
    scores: Mapping[Key, Mapping[str, CellScore]]
    bench: Bench
    reads: Mapping[str, SharedRead]
    size: tuple[int, int]


def sweep_denoiser(
    denoiser: Denoiser,
    measures: Sequence[Measure],
    splits: Mapping[str, Split],
    encode: Callable[[Tensor], Tensor],
    levels: Sequence[NoiseLevel],
    layers: Sequence[str] | str | None,
    *,
    noise: str,
    seed: int,
    condition: Mapping[str, Any],
    image_size: ImageSize,
    batch_size: int,
    memory_gib: float,
    progress: Progress,
) -> Swept:
    """Every measure of every layer of a denoiser at every level, in one pass where memory allows.

    Args:
        denoiser: The model.
        measures: What is measured.
        splits: `train`, and `held` for measures that score on other images.
        encode: From pixels to the features `(n, D)` to compare with.
        levels: Of `resolve_timesteps`.
        layers: As in `measure_alignment`, and the rest.
        noise: Policy.
        seed: Of the noise.
        condition: `prompt` and `class_labels`.
        image_size: As in `measure_alignment`.
        batch_size: Images a forward.
        memory_gib: Features held at a time.
        progress: As `measure_alignment`.
    """
    check_whole("batch_size", batch_size, 1)
    resize = denoiser.resize_to(image_size)
    size = splits["train"].image_size(denoiser.image_channels, resize)
    grid = SweepGrid(denoiser, resolve_layers(denoiser, layers, size), tuple(levels))
    bench = Bench(splits, grid.device, encode)
    for measure in measures:
        measure.check(bench)
    reads: dict[str, SharedRead] = {}

    def read(role: str, found: SharedRead) -> None:
        reads[role] = found
        if role == "held":
            tell_overlap(reads["train"].keys, found.keys, "data", "test")

    with SweepBar(progress, "alignment") as bar:
        sweep = Sweep(measures, bench, memory_gib * 2**30, batch_size, condition, resize, bar)
        scores = sweep.run(grid, check_policy(noise), dict.fromkeys(splits, seed), "alignment", read)
    return Swept(grid, scores, bench, reads, size)


def resolve_timesteps(denoiser: Denoiser, timesteps: Sequence[LevelLike] | None) -> list[NoiseLevel]:
    """The levels asked for, the least noisy first; `default_levels` if None."""
    levels = resolve_levels(denoiser, default_levels(denoiser) if timesteps is None else timesteps)
    return sorted(levels, key=lambda level: (float(level.nsr), float(level.timestep)))


def _cells(
    grid: SweepGrid, scores: Mapping[Key, Mapping[str, CellScore]], names: Sequence[str]
) -> tuple[AlignmentCell, ...]:
    return tuple(
        AlignmentCell(
            **place,
            dim=grid.layers[place["layer"]].channels,
            scores={name: scores[at, place["layer"]][name].value for name in names},
        )
        for at, place in grid.places()
    )


def make_measures(metrics: Sequence[str | Measure] | str | Measure, **settings: Any) -> list[Measure]:
    """The measures of names, each once.

    Args:
        metrics: Names, or measures.
        **settings: Of those that are named.

    Raises:
        ValueError: For an unknown name, none, or one twice.
    """
    asked = [metrics] if isinstance(metrics, (str, Measure)) else list(metrics)
    measures = [make_measure(metric, **settings) for metric in asked]
    names = [measure.name for measure in measures]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"metrics must name at least one measure, each once; got {names}.")
    return measures


def open_compared(
    measures: Sequence[Measure], data: Any, test: Any, samples: int | None, seed: int
) -> dict[str, Split]:
    """`train`, and `held` where a measure scores on other images; no image is read.

    Args:
        measures: What is measured.
        data: As in `measure_alignment`, and the rest.
        test: Images that probes are measured on.
        samples: As many of `data`.
        seed: That draws them.

    Raises:
        ValueError, TypeError: For data that do not suit the measures.
    """
    labelled = any(measure.needs_labels for measure in measures)
    scored = any("held" in measure.roles for measure in measures)
    if scored and test is None:
        raise ValueError("Probes are measured on images they were not fitted on; pass test=(images, labels).")
    splits = {"train": open_split(data, "data", labelled, samples, seed)}
    return {**splits, "held": open_split(test, "test", labelled, None, seed)} if scored else splits


def open_split(data: Any, role: str, labelled: bool, samples: int | None, seed: int) -> Split:
    """Images, or `(images, labels)`, as a split; as many as `samples`, drawn by the seed."""
    labels = None
    if labelled or (isinstance(data, tuple) and len(data) == 2):
        opened = open_labelled(data, role)
        labels = opened.class_ids("Probes tell classes apart.") if labelled else opened.targets
        images = open_images(opened.images, role)
    else:
        images = open_images(data, role)
    rows = list(range(len(images)))
    if samples is not None:
        check_whole("samples", samples, 1, len(images))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        rows = sorted(order[:samples].tolist())
    return Split(images, rows, images.name, None if labels is None else labels[torch.tensor(rows)])


def default_levels(denoiser: Denoiser) -> list[LevelLike]:
    """Five levels: 10 to 90 % of the training timesteps; of EDM and VE models, evenly spaced in log sigma."""
    schedule = denoiser.schedule
    if schedule.kind in ("edm", "ve"):
        low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        return [NoiseLevel(nsr=math.exp(low + share * (high - low))) for share in _SHARES]
    return [round(share * schedule.num_train_timesteps) for share in _SHARES]


def warn_undefined(scores: Mapping[Key, Mapping[str, CellScore]]) -> None:
    """One warning for each metric and reason, that names the layers."""
    undefined: dict[tuple[str, str], dict[str, None]] = {}  # (metric, why) -> layers
    for (_, path), named in scores.items():
        for metric, score in named.items():
            if score.value is None:
                undefined.setdefault((metric, score.why or ""), {})[path] = None
    for (metric, why), paths in undefined.items():
        warnings.warn(f"No {metric} for {', '.join(paths)}: {why}", stacklevel=3)


def _recipe(
    denoiser: Denoiser,
    encoder: Encoder,
    splits: Mapping[str, Split],
    reads: Mapping[str, SharedRead],
    size: tuple[int, int],
) -> dict[str, Any]:
    """What was compared, on which images."""
    resized = encoder.source.size(reads["train"].image_size)
    data = {
        role: {"name": split.images.name, "samples": len(split), "images_hash": reads[role].images_hash}
        for role, split in splits.items()
    }
    return {
        "model": model_record(denoiser),
        "encoder": encoder.fingerprint(),
        "data": data["train"],
        "test": data.get("held"),
        "resize": f"{size[0]}x{size[1]} to {resized[0]}x{resized[1]} for the encoder",
        "image_size": list(size),
        "backend": backend_record(),
    }


def model_record(denoiser: Denoiser) -> dict[str, Any]:
    """Which model was measured, with a hash of its weights."""
    base = base_record(denoiser, weights=True)
    return {"name": base.name, "revision": base.revision, "class": base.model_class, "weights": base.weights}


def backend_record() -> dict[str, str]:
    """What measured."""
    from diffusers_repr import __version__

    return {"name": "diffusers-repr", "version": __version__}
