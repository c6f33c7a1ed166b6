"""A sweep over layers and noise levels: how close is a denoiser's representation to an encoder's?"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from diffusers_repr.capture import check_layers
from diffusers_repr.data.labelled import open_labelled
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.denoiser import require_denoiser
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.encoders import Encoder
from diffusers_repr.features.extraction import process_state
from diffusers_repr.features.extractor import FeatureExtractor, Timestep
from diffusers_repr.heads.fitting.protocols import Protocol, get_protocol
from diffusers_repr.hub.identity import fingerprint
from diffusers_repr.metrics.checks import check_whole
from diffusers_repr.metrics.encoding import Which, check_which, open_images
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.sweep.alignment_read import Reader, SetFeatures, choose_layers, plan_passes
from diffusers_repr.sweep.alignment_result import Alignment, AlignmentCell
from diffusers_repr.sweep.alignment_sweep import METRICS, PROBES, Samples, Settings, Sweep

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the noise range, where no levels are given


def measure_alignment(
    denoiser: Denoiser,
    encoder: Encoder,
    data: Any,
    timesteps: Sequence[Timestep] | None = None,
    layers: Sequence[str] | str | None = None,
    *,
    metrics: Sequence[str] | str = ("cknna",),
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
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    memory_gib: float = 4.0,
    progress: bool = False,
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
        metrics: Of `cknna`, `cka` (unbiased) and, on labelled data, `linear` and `knn`; the first decides `best`.
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
        image_size: Resize to (H, W) or a square.
        batch_size: Images a forward.
        memory_gib: Features held at a time; beyond it, levels are read one after another.
        progress: Show a bar.

    Raises:
        ValueError, TypeError: For layers, levels, metrics, images or labels that do not fit; before the first forward
            where that can be known.
        FloatingPointError: If a layer gives NaN or infinity; names it.
    """
    require_denoiser(denoiser)
    if not isinstance(encoder, Encoder):
        raise TypeError(f"encoder must be an Encoder; got {type(encoder).__name__}. See Encoder.from_pretrained.")
    metrics = check_metrics(metrics)
    check_which(features)
    check_whole("batch_size", batch_size, 1)
    chosen = get_protocol(protocol, "linear")
    probing = bool(set(metrics) & set(PROBES))
    if probing and test is None:
        raise ValueError("Probes are measured on images they were not fitted on; pass test=(images, labels).")
    train = _open(data, "data", probing, samples, seed)
    held = _open(test, "test", True, None, seed) if probing else None
    count = len(train.rows)
    if "cknna" in metrics:
        check_whole("k", k, 1, count - 1)
    if "knn" in metrics:
        check_whole("knn_k", knn_k, 1, count)
    levels = _levels(denoiser, timesteps)
    if layers is not None:
        check_layers(denoiser.model, layers)
    first = to_pixels(train.images.read(train.rows[:1]), denoiser.image_channels, image_size)
    size = (first.shape[2], first.shape[3])
    table = choose_layers(denoiser, layers, size)
    extractor = FeatureExtractor(
        denoiser,
        list(table),
        levels,
        noise,
        pooling="mean",
        batch_size=batch_size,
        output_device="cpu",
        seed=seed,
        image_size=image_size,
    )
    passes = plan_passes(table, len(levels), count + (len(held.rows) if held else 0), memory_gib * 2**30)
    bar = _Bar(progress, len(passes) * sum(-(-len(part.rows) // batch_size) for part in (train, held) if part))
    condition = {"prompt": prompt, "class_labels": class_labels}
    reader = Reader(extractor, encoder, features, condition, batch_size, bar.step)
    settings = Settings(metrics, k, knn_k, chosen, symmetric, clamp_quantile, seed)
    sweep = Sweep(reader, settings, train, held, levels)
    try:
        scores, own = sweep.run(passes)
    finally:
        bar.close()
    for (metric, why), paths in sweep.undefined.items():
        warnings.warn(f"No {metric} for {', '.join(paths)}: {why}", stacklevel=2)
    cells = tuple(
        AlignmentCell(
            path, order, _plain(level.timestep), float(level.nsr), layer.channels, layer.flops_share, scores[path, at]
        )
        for at, level in enumerate(levels)
        for order, (path, layer) in enumerate(table.items())
    )
    return Alignment(cells, metrics, own, _recipe(sweep, condition, size))


class _Bar:
    """A bar over batches of images, on the main process; silent if not wanted."""

    def __init__(self, shown: bool, total: int) -> None:
        from tqdm.auto import tqdm

        state = process_state()
        total = -(-total // state.num_processes)
        self.bar = tqdm(total=total, desc="alignment", unit="batch", disable=not (shown and state.is_main_process))

    def step(self) -> None:
        self.bar.update(1)

    def close(self) -> None:
        self.bar.close()


def check_metrics(metrics: Sequence[str] | str) -> tuple[str, ...]:
    """The metrics, if they are some.

    Raises:
        ValueError: For an unknown name, none, or one twice.
    """
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"Unknown metric {metric!r}; expected one of {', '.join(METRICS)}.")
    if not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"metrics must name at least one of {', '.join(METRICS)}, each once; got {list(metrics)}.")
    return metrics


def _open(data: Any, role: str, labelled: bool, samples: int | None, seed: int) -> Samples:
    labels = None
    if labelled or (isinstance(data, tuple) and len(data) == 2):
        opened = open_labelled(data, role)
        labels = opened.class_ids("Probes tell classes apart.") if labelled else None
        images = open_images(opened.images, role)
    else:
        images = open_images(data, role)
    rows = list(range(len(images)))
    if samples is not None:
        check_whole("samples", samples, 1, len(images))
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        rows = sorted(order[:samples].tolist())
    return Samples(images, rows, None if labels is None else labels[torch.tensor(rows)])


def _levels(denoiser: Denoiser, timesteps: Sequence[Timestep] | None) -> list[NoiseLevel]:
    """Resolved, the least noisy first."""
    if timesteps is None:
        timesteps = default_levels(denoiser)
    if isinstance(timesteps, (int, float, str, NoiseLevel)) or not isinstance(timesteps, Sequence):
        raise TypeError(f"timesteps must be a list of levels, e.g. [100, 500]; got {timesteps!r}.")
    if not timesteps:
        raise ValueError("No timesteps: the list is empty.")
    levels = [denoiser.level(t) for t in timesteps]
    told = [float(level.timestep) for level in levels]
    for at, timestep in enumerate(told):
        if timestep in told[:at]:
            raise ValueError(f"Timestep {timestep:g} is given twice.")
    return sorted(levels, key=lambda level: (float(level.nsr), float(level.timestep)))


def default_levels(denoiser: Denoiser) -> list[Timestep]:
    """Five levels: 10 to 90 % of the training timesteps; of EDM and VE models, evenly spaced in log sigma."""
    schedule = denoiser.schedule
    if schedule.kind in ("edm", "ve"):
        low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
        return [NoiseLevel(nsr=math.exp(low + share * (high - low))) for share in _SHARES]
    return [round(share * schedule.num_train_timesteps) for share in _SHARES]


def _plain(timestep: Any) -> int | float:
    value = float(timestep)
    return int(value) if value.is_integer() else value


def _recipe(sweep: Sweep, condition: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    from diffusers_repr import __version__

    reader, read, settings = sweep.reader, sweep.read, sweep.settings
    assert read is not None
    denoiser, encoder = reader.denoiser, reader.encoder
    resized = encoder.source.size(read.image_size)
    recipe = {
        "model": {
            "name": denoiser.name,
            "revision": denoiser.revision,
            "class": type(getattr(denoiser.model, "_orig_mod", denoiser.model)).__name__,
            "weights": fingerprint(denoiser.model, denoiser.vae),
        },
        "encoder": encoder.fingerprint(),
        "features": reader.which,
        "data": _described(sweep.train, read),
        "test": None if sweep.held is None or sweep.read_held is None else _described(sweep.held, sweep.read_held),
        "resize": f"{size[0]}x{size[1]} to {resized[0]}x{resized[1]} for the encoder",
        "image_size": list(size),
        "noise": reader.extractor.noise.policy,
        "sample_posterior": False,
        "seed": settings.seed,
        "k": settings.k,
        "settings": {metric: settings.of(metric) for metric in settings.metrics},
        **condition,
        "backend": {"name": "diffusers-repr", "version": __version__},
    }
    return json.loads(json.dumps(recipe))  # lists for tuples, as it will be read back


def _described(samples: Samples, read: SetFeatures) -> dict[str, Any]:
    return {"name": samples.images.name, "samples": len(samples.rows), "images_hash": read.images_hash}


__all__ = ["METRICS", "check_metrics", "default_levels", "measure_alignment"]
