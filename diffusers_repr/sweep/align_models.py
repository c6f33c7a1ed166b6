"""Several denoisers against several encoders: alignment by size, by training steps, by encoder (REPA, figure 2)."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics.checks import UndefinedScoreError
from diffusers_repr.metrics.encoding import Which, check_which, pick
from diffusers_repr.noise import LevelLike
from diffusers_repr.sweep.align import (
    Swept,
    backend_record,
    make_measures,
    model_record,
    open_split,
    resolve_timesteps,
    sweep_denoiser,
    warn_undefined,
)
from diffusers_repr.sweep.align_comparison import AlignmentComparison, ComparisonCell
from diffusers_repr.sweep.measure import Bench, Held, Measure, Split

Model = Denoiser | str | Path | Callable[[], Denoiser]


@dataclass(frozen=True)
class _Against(Measure):
    """A similarity with one of several encoders, whose features lie side by side in the bench."""

    base: Measure = None  # type: ignore[assignment]  # fields of the base have defaults
    columns: tuple[int, int] = (0, 0)

    roles: ClassVar[tuple[str, ...]] = ("train",)
    needs_encoder: ClassVar[bool] = True

    def check(self, bench: Bench) -> None:
        """As the similarity."""
        self.base.check(bench)

    def score(self, cell: Held) -> float:
        """As the similarity, with this encoder's columns."""
        return self.base.score(cell._replace(bench=self.only(cell.bench)))

    def only(self, bench: Bench) -> Bench:
        """The bench with this encoder's features alone."""
        start, stop = self.columns
        return dataclasses.replace(bench, reference={k: x[:, start:stop] for k, x in bench.reference.items()})


def compare_alignments(
    models: Mapping[str, Model],
    encoders: Sequence[Encoder],
    data: Any,
    timesteps: Sequence[LevelLike] | None = None,
    layers: Sequence[str] | str | None = None,
    *,
    metric: str | Measure = "cknna",
    steps: Sequence[float] | None = None,
    k: int = 10,
    samples: int | None = None,
    features: Which = "tokens",
    symmetric: bool = True,
    clamp_quantile: float | None = None,
    noise: str = "per_image",
    seed: int = 0,
    prompt: str | None = None,
    class_labels: int | None = None,
    image_size: ImageSize = None,
    batch_size: int = 64,
    memory_gib: float = 4.0,
    progress: bool = False,
) -> AlignmentComparison:
    """Score every layer of several denoisers against several encoders, on the same images: REPA's figure 2.

    Each score is that of `measure_alignment` for the pair; one forward of a denoiser serves all encoders, and the
    denoisers are loaded one after another.

    Args:
        models: Label -> a denoiser, its folder or Hub id, or a function that loads it when it is its turn.
        encoders: With names of which no two are alike; `load_encoders` makes such.
        data: As in `measure_alignment`, as all that is not told here.
        timesteps: Levels, the same of all models.
        layers: Paths that all models have; those of `list_layers` of each if None.
        metric: `cknna`, `cka` or another measure that compares with an encoder.
        steps: Of the training of each model, as many as there are models.
        k: Neighbours of CKNNA.
        samples: As many images, drawn by the seed; all if None.
        features: The encoders'.
        symmetric: As in `cknna`.
        clamp_quantile: As in `cknna` and `cka`.
        noise: Policy.
        seed: Of noise and samples.
        prompt: One for all images.
        class_labels: One class id for all images.
        image_size: As in `measure_alignment`; None is each model's own size, so models of several sizes see, and the
            encoders with them, images of several sizes.
        batch_size: Images a forward.
        memory_gib: Features held at a time.
        progress: Show a bar a model.

    Raises:
        ValueError, TypeError: As `measure_alignment`; for a metric that compares with no encoder, as many steps as
            there are no models, and encoders of one name.
    """
    base = _similarity(metric, k=k, symmetric=symmetric, clamp_quantile=clamp_quantile)
    check_which(features)
    _check_encoders(encoders)
    told = _check_models(models, steps)
    split = open_split(data, "data", False, samples, seed)
    condition = {"prompt": prompt, "class_labels": class_labels}
    settings: dict[str, Any] = {"noise": noise, "seed": seed, "condition": condition, "image_size": image_size}
    settings |= {"batch_size": batch_size, "memory_gib": memory_gib, "progress": progress}

    def encode(pixels: Tensor) -> Tensor:
        return torch.cat([pick(encoder.encode_pixels(pixels), features).cpu() for encoder in encoders], 1)

    measures: list[_Against] = []
    cells: list[ComparisonCell] = []
    about: dict[str, dict[str, Any]] = {}
    between: dict[str, dict[str, float | None]] = {}
    images: dict[str, dict[str, Any]] = {}
    for label, model in models.items():
        denoiser = _loaded(model)
        require_images(denoiser, "Alignment")
        levels = resolve_timesteps(denoiser, timesteps)
        if not measures:
            widths = _widths(encoders, split, features, denoiser.resize_to(image_size))
            measures = _side_by_side(base, encoders, widths)
        swept = sweep_denoiser(denoiser, measures, {"train": split}, encode, levels, layers, **settings)
        cells += _cells(label, measures, swept)
        named = [
            (key, {f"{base.name} of {label} with {n}": s for n, s in of.items()}) for key, of in swept.scores.items()
        ]
        warn_undefined(dict(named))
        parameters = sum(parameter.numel() for parameter in denoiser.model.parameters())
        about[label] = {"parameters": parameters, **model_record(denoiser), "step": told[label]}
        between = between or _between(measures, swept.bench)
        images[label] = {"hash": swept.reads["train"].images_hash, "size": list(swept.size)}
    recipe = {
        **_recipe(split, base, images),
        **condition,
        **{"features": features, "noise": noise, "seed": seed},
    }
    fingerprints = {encoder.name: encoder.fingerprint() for encoder in encoders}
    plain = json.loads(json.dumps([about, fingerprints, between, recipe]))  # lists for tuples, as read back
    return AlignmentComparison(tuple(cells), base.name, *plain)


def _similarity(metric: str | Measure, **settings: Any) -> Measure:
    """The measure that is taken against every encoder."""
    (base,) = make_measures(metric, **settings)
    if not base.needs_encoder or base.pooling is None:
        raise ValueError(f"{base.name!r} compares with no encoder; cknna and cka do.")
    return base


def _check_encoders(encoders: Sequence[Encoder]) -> None:
    if not encoders or any(not isinstance(encoder, Encoder) for encoder in encoders):
        raise TypeError(f"encoders must be a list of Encoder; got {encoders!r}. See `load_encoders`.")
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Encoders of one name: {', '.join(names)}; give each its own by `name=`, or `load_encoders`."
        )


def _widths(encoders: Sequence[Encoder], split: Split, features: str, resize: tuple[int, int] | None) -> list[int]:
    """Length of the features of each encoder, by the first image."""
    first = split.images.read(split.rows[:1])
    read = (encoder.encode_pixels(to_pixels(first, encoder.channels, resize)) for encoder in encoders)
    return [pick(output, features).shape[1] for output in read]


def _side_by_side(base: Measure, encoders: Sequence[Encoder], widths: Sequence[int]) -> list[_Against]:
    """The similarity with each encoder."""
    ends = [0, *itertools.accumulate(widths)]
    return [
        # another name, so that what a measure makes once for all cells is made once for each encoder
        _Against(
            encoder.name,
            base.pooling,
            base=dataclasses.replace(base, name=f"{base.name} {encoder.name}"),
            columns=columns,
        )
        for encoder, columns in zip(encoders, itertools.pairwise(ends), strict=True)
    ]


def _check_models(models: Mapping[str, Model], steps: Sequence[float] | None) -> dict[str, float | None]:
    """Label -> step."""
    if not isinstance(models, Mapping) or not models:
        raise TypeError("models must be a mapping of labels to denoisers, folders or functions, at least one.")
    if steps is not None and len(steps) != len(models):
        raise ValueError(f"{len(steps)} steps for {len(models)} models; give one each, or none.")
    return dict(zip(models, steps, strict=True)) if steps else dict.fromkeys(models)


def _loaded(model: Model) -> Denoiser:
    if isinstance(model, (str, Path)):
        return Denoiser.from_pretrained(str(model))
    return model if isinstance(model, Denoiser) else model()


def _cells(label: str, measures: Sequence[_Against], swept: Swept) -> list[ComparisonCell]:
    return [
        ComparisonCell(
            **place,
            dim=swept.grid.layers[place["layer"]].channels,
            model=label,
            encoder=measure.name,
            score=swept.scores[at, place["layer"]][measure.name].value,
        )
        for measure in measures
        for at, place in swept.grid.places()
    ]


def _between(measures: Sequence[_Against], bench: Bench) -> dict[str, dict[str, float | None]]:
    """Encoder -> other encoder -> score of the other's features."""
    found: dict[str, dict[str, float | None]] = {}
    for one in measures:
        for other in measures:
            if other is not one:
                theirs = other.only(bench).reference["train"].to(bench.device)
                try:
                    score: float | None = one.score(Held(theirs, None, bench))
                except UndefinedScoreError:
                    score = None
                found.setdefault(one.name, {})[other.name] = score
    return found


def _recipe(split: Split, base: Measure, images: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "data": {"name": split.images.name, "samples": len(split)},
        "images": images,
        "settings": base.describe(),
        "sample_posterior": False,
        "backend": backend_record(),
    }


__all__ = ["compare_alignments"]
