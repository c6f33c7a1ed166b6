"""`noise_curve`: how well a layer tells classes at every noise level, by one classifier that is told the level."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.capture import capture, check_layers
from diffusers_repr.data.labelled import Labelled
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.estimates import check_scheduler
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.features.noise_policy import NoiseSource, keyed_generator, pixel_keys
from diffusers_repr.features.pooling import pool, pooled_size
from diffusers_repr.features.presets import edm_sigma
from diffusers_repr.heads import PROTOCOLS
from diffusers_repr.heads.fitting.fit import check_several_classes
from diffusers_repr.heads.fitting.minibatch import descend
from diffusers_repr.heads.fitting.protocols import MinibatchProtocol
from diffusers_repr.hub import atomic_write
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.places import public_name
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.objectives.classifier import timesteps_at
from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.tasks.images import class_data
from diffusers_repr.tasks.probe_fit import check_labels, open_classes

_LEVELS = 20  # of a process without a grid of its own


class NoiseConditionalMLP(nn.Module):
    """DDAE's noise-conditional classifier (arXiv 2303.09769): `MLP(f + TimeEmbedding(t))`, hidden width 2 D, SiLU.

    Args:
        in_features: D, values of a pooled feature; a multiple of 8, from 16.
        num_classes: K.

    Example:
        >>> NoiseConditionalMLP(16, 3)(torch.ones(2, 16), torch.tensor([1.0, 951.0])).shape
        torch.Size([2, 3])
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        if in_features < 16 or in_features % 8:
            raise ValueError(
                f"The embedding of the level is as long as the feature, {in_features}; it takes a multiple of 8 from "
                "16. Choose another layer or pooling."
            )
        quarter = in_features // 4
        self.time = Timesteps(quarter, flip_sin_to_cos=False, downscale_freq_shift=1)
        self.embed = nn.Sequential(nn.Linear(quarter, in_features), nn.SiLU(), nn.Linear(in_features, in_features))
        self.classify = nn.Sequential(
            nn.Linear(in_features, 2 * in_features), nn.SiLU(), nn.Linear(2 * in_features, num_classes)
        )

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        """Logits `(B, K)` of features `(B, D)` and what they are told of the level, `(B,)`."""
        return self.classify(features + self.embed(self.time(time)))


@dataclass(frozen=True)
class NoiseCurve:
    """Test accuracy by noise level.

    Attributes:
        layer: That is read.
        timesteps: Of the levels, least noisy first.
        nsr: Their noise-to-signal ratios.
        accuracies: On the test images.
        recipe: Base, data, protocol.
        classifier: The one that all accuracies are of.
    """

    layer: str
    timesteps: tuple[float, ...]
    nsr: tuple[float, ...]
    accuracies: tuple[float, ...]
    recipe: dict[str, Any]
    classifier: NoiseConditionalMLP = field(repr=False, compare=False)

    @property
    def best(self) -> tuple[float, float]:
        """Timestep of the highest accuracy, and that accuracy."""
        at = max(range(len(self.accuracies)), key=lambda i: (self.accuracies[i], -i))
        return self.timesteps[at], self.accuracies[at]

    def plot(self) -> Any:
        """A figure of matplotlib: accuracy by noise level; `figure.savefig("curve.png")` keeps it.

        Raises:
            ImportError: If matplotlib is missing.
        """
        figure = require_matplotlib().Figure(figsize=(6.4, 3.8), layout="constrained", dpi=120)
        axes = figure.add_subplot()
        axes.plot(self.timesteps, [100 * value for value in self.accuracies], marker="o", markersize=4)
        axes.axhline(100 / self.recipe["classes"], color="0.6", linestyle="--", linewidth=1)
        axes.annotate("chance", (self.timesteps[0], 100 / self.recipe["classes"]), xytext=(0, 4),
                      textcoords="offset points", color="0.4", fontsize=8)  # fmt: skip
        axes.set_xlabel("timestep (noisier to the right)")
        axes.set_ylabel("test accuracy (%)")
        axes.set_title(f"{self.layer}: one classifier that is told the level", fontsize=10)
        axes.grid(alpha=0.3)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {name: list(getattr(self, name)) for name in ("timesteps", "nsr", "accuracies")}
        return {"layer": self.layer, **values, "recipe": self.recipe}

    def save(self, folder: str | Path, plot: bool = True) -> None:
        """Write `noise_curve.json` and `noise_curve.png` into a folder, which is made if missing."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        atomic_write(place / "noise_curve.json", json.dumps(self.to_dict(), indent=2) + "\n")
        if plot:
            atomic_write(place / "noise_curve.png", png_of(self.plot()))


def noise_curve(
    denoiser: Denoiser,
    layer: str,
    train: Any,
    test: Any,
    *,
    timesteps: Sequence[float] | None = None,
    pooling: str = "mean",
    draws: int | None = None,
    protocol: MinibatchProtocol | None = None,
    seed: int = 0,
    prompt: str | None = None,
    class_labels: int | None = None,
    image_size: ImageSize = None,
    batch_size: int = 64,
    progress: Callable[[str], object] | None = None,
) -> NoiseCurve:
    """Fit DDAE's noise-conditional classifier on one layer at all levels at once, and measure it level by level.

    Each image is read `draws` times, each time at a level of its own with noise of its own; epochs take turns. The
    classifier is told the level: the timestep counted from 1, of EDM the index in its grid of 18.

    Args:
        denoiser: Any `Denoiser`.
        layer: Full module path.
        train: Labelled images; see `Probe.fit`.
        test: The same, to measure on.
        timesteps: To measure at. If None, 20 spread over the process as the source does (0, 50, ...), the 18 of EDM's
            grid.
        pooling: As in `FeatureExtractor`.
        draws: Readings of `train`; as many as epochs if None, as in the source, where each epoch has new noise.
        protocol: `ddae` if None: Adam at 1e-3, batches of 128, 15 epochs, cosine.
        seed: Of levels, noise, first weights and order.
        prompt: Of every image.
        class_labels: Condition of every image for class-conditional models; never the labels of the task.
        image_size: As in `FeatureExtractor`.
        batch_size: Images of a forward.
        progress: Called with a line at each reading.

    Raises:
        ValueError, TypeError: For layers, levels, protocols or data that do not exist or fit, and a network that was
            not trained for its scheduler.
    """
    require_images(denoiser, "A noise curve")
    layer = next(iter(check_layers(denoiser.model, layer)))
    pooled_size(pooling)
    chosen = PROTOCOLS["ddae"] if protocol is None else protocol
    if not isinstance(chosen, MinibatchProtocol) or chosen.standardize or chosen.batch_norm or chosen.init_std:
        raise ValueError("protocol must be one of gradient steps, without standardisation, batch_norm and init_std.")
    draws = chosen.epochs if draws is None else check_whole("draws", draws, 1)
    data, _, names = open_classes(train)
    tested = class_data(test, "test")
    check_labels(tested, names)
    check_several_classes(data.targets, tested.targets)
    check_scheduler(denoiser)
    grid = _Grid(denoiser, timesteps)
    reader = _Reader(denoiser, layer, pooling, NoiseSource("per_image", seed), (prompt, class_labels),
                     denoiser.resize_to(image_size), batch_size)  # fmt: skip
    tell = progress or (lambda line: None)
    found, told = [], []
    for draw in range(draws):
        times, codes = grid.draw(len(data), keyed_generator(seed, "levels", draw))
        found.append(reader.read(data, times, draw))
        told.append(codes)
        tell(f"reading {draw + 1} of {draws}")
    features, codes = torch.stack(found), torch.stack(told)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        classifier = NoiseConditionalMLP(features.shape[2], len(names)).to(denoiser.device)
    steps, device = itertools.count(), denoiser.device
    size = min(chosen.batch_size, len(data))
    of_epoch = len(data) // size if chosen.drop_last else -(-len(data) // size)

    def loss(rows: Tensor) -> Tensor:
        draw, rows = next(steps) // of_epoch % draws, rows.cpu()
        logits = classifier(features[draw, rows].to(device), codes[draw, rows].to(device))
        return functional.cross_entropy(logits, data.targets[rows].to(device))

    descend(list(classifier.parameters()), loss, len(data), chosen, generator)
    classifier.eval().cpu()
    accuracies = []
    for at, time in enumerate(grid.times):
        read = reader.read(tested, torch.full((len(tested),), time, dtype=torch.float64), 0)
        with torch.no_grad():
            guesses = classifier(read, torch.full((len(tested),), grid.codes[at])).argmax(1)
        accuracies.append(float((guesses == tested.targets).double().mean()))
        tell(f"timestep {time:g}: {accuracies[-1]:.3f}")
    levels = [denoiser.level(time) for time in grid.times]
    recipe = {
        "model": denoiser.name if denoiser.name is None else public_name(denoiser.name),
        "model_class": type(plain_module(denoiser.model)).__name__,
        "pooling": pooling,
        "draws": draws,
        "protocol": chosen.describe(),
        "seed": seed,
        "classes": len(names),
        "train": {"dataset": public_name(data.name), "split": data.split, "rows": len(data)},
        "test": {"dataset": public_name(tested.name), "split": tested.split, "rows": len(tested)},
    }
    nsr = tuple(float(level.nsr) for level in levels)
    return NoiseCurve(layer, tuple(grid.times), nsr, tuple(accuracies), recipe, classifier)


class _Grid:
    """The levels that are measured, those that are drawn, and what the classifier is told of each."""

    def __init__(self, denoiser: Denoiser, timesteps: Sequence[float] | None) -> None:
        schedule = self.schedule = denoiser.schedule
        if schedule.kind == "edm":
            if timesteps is not None:
                raise ValueError("EDM's levels are those of its grid of 18; leave timesteps out.")
            levels = [denoiser.level(NoiseLevel(nsr=edm_sigma(index))) for index in range(1, 19)]
            self.times = [float(level.timestep) for level in levels]
        elif timesteps is None:
            self.times = timesteps_at(schedule, torch.arange(_LEVELS, dtype=torch.float64) / _LEVELS).tolist()
        else:
            self.times = [float(denoiser.level(time).timestep) for time in timesteps]
        self.codes = self._codes(torch.tensor(self.times, dtype=torch.float64)).tolist()

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Timesteps `(count,)` float64, and what the classifier is told of them."""
        if self.schedule.kind == "edm":
            times = torch.tensor(self.times, dtype=torch.float64)[torch.randint(18, (count,), generator=generator)]
        else:
            times = timesteps_at(self.schedule, torch.rand(count, generator=generator, dtype=torch.float64))
        return times, self._codes(times)

    def _codes(self, times: Tensor) -> Tensor:
        if self.schedule.kind == "edm":
            grid = torch.tensor(self.times, dtype=torch.float64)
            return (1 + (times[:, None] - grid).abs().argmin(1)).float()
        low, high = self.schedule.timestep_range
        if self.schedule.kind == "vp":
            return (times + 1).float()
        if self.schedule.kind == "ve":
            return (1000 * (times / low).log() / torch.tensor(high / low).log()).float()
        return (1000 * (times - low) / (high - low)).float()


@dataclass
class _Reader:
    """Reads images, each at a level of its own."""

    denoiser: Denoiser
    layer: str
    pooling: str
    noise: NoiseSource
    condition: tuple[str | None, int | None]
    resize: tuple[int, int] | None
    batch_size: int

    @torch.no_grad()
    def read(self, data: Labelled, times: Tensor, draw: int) -> Tensor:
        """Pooled features `(N, D)` on the CPU.

        Args:
            data: The images.
            times: Timestep of each.
            draw: Which draw of an image's noise.
        """
        denoiser, found = self.denoiser, []
        for rows, pixels in data.pixels(self.batch_size, denoiser.image_channels, self.resize):
            x0 = denoiser.encode_pixels(pixels.to(denoiser.device)).float()
            noise = self.noise.draw(pixel_keys(pixels), [draw] * len(pixels), x0.shape[1:])
            assert noise is not None
            level = denoiser.level(times[list(rows)]).to(x0.device)
            condition = denoiser.condition(
                self.condition[0], class_labels=self.condition[1], batch=len(x0), size=tuple(pixels.shape[2:])
            )
            with denoiser.evaluating(), capture(denoiser.model, [self.layer]) as tape:
                denoiser.predict(denoiser.add_noise(x0, level, noise.to(x0.device)), level, condition)
            value = tape[self.layer]
            place = denoiser.token_grid(self.layer, value.shape[1], tuple(x0.shape[2:])) if value.ndim == 3 else None
            found.append(pool(value, self.pooling, place).cpu())
        return torch.cat(found)


__all__ = ["NoiseConditionalMLP", "NoiseCurve", "noise_curve"]
