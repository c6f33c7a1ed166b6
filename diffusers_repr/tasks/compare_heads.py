"""`compare_heads`: all heads on one base under one protocol, with few labels and with all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.data.labelled import Labelled
from diffusers_repr.data.overlap import tell_overlap
from diffusers_repr.denoiser import Denoiser, list_layers
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.denoiser.untrained import untrained
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.heads import PROTOCOLS, PooledHead, fit_head, fit_map_head
from diffusers_repr.heads.fitting.fit import accuracy_of, check_several_classes
from diffusers_repr.heads.fitting.maps import map_accuracy
from diffusers_repr.heads.fitting.protocols import MinibatchProtocol
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.hub.places import public_name
from diffusers_repr.noise import LevelLike, NoiseLevel
from diffusers_repr.sweep.selection import Selection
from diffusers_repr.tasks.feedback_fit import FeedbackFit
from diffusers_repr.tasks.head_scores import HeadComparison, HeadScore, nested_rows
from diffusers_repr.tasks.images import class_data, pooled_features
from diffusers_repr.tasks.probe_fit import check_labels, open_classes

# Name -> (kind of head, what it reads): vectors or maps of the one best place, maps of several places, or the network.
HEADS: dict[str, tuple[str, str]] = {
    "linear": ("linear", "vectors"),
    "mlp": ("mlp", "vectors"),
    "knn": ("knn", "vectors"),
    "convolution": ("convolution", "maps"),
    "attention": ("attention", "maps"),
    "difformer": ("attention", "several"),
    "diffeed": ("feedback", "network"),
}
BASELINES = ("random", "pixels")


@dataclass(frozen=True)
class HeadPlaces:
    """Where heads read a base.

    Attributes:
        layer: Of heads on one place.
        timestep: Likewise.
        layers: Of heads that fuse layers.
        timesteps: Of heads that fuse levels; every layer is read at each.
        decoder: Layer behind all layers that are fed, for the head that feeds back; None: none was tried.
    """

    layer: str
    timestep: float
    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    decoder: str | None = None

    @classmethod
    def of(cls, selection: Selection, count: int = 3) -> HeadPlaces:
        """From a selection: its best cell; the best layer of each of the `count` best stages, and the best levels.

        A stage is the first part of a path, such as `mid_block` or `up_blocks.0`: layers of one stage tell much the
        same.
        """
        cells = sorted(selection.cells, key=lambda cell: -cell.score)
        best = selection.best
        stages: dict[str, str] = {_stage(best.layer): best.layer}
        for cell in cells:
            stages.setdefault(_stage(cell.layer), cell.layer)
        order = {cell.layer: cell.order for cell in cells}
        layers = sorted(list(stages.values())[:count], key=order.__getitem__)
        levels = list(dict.fromkeys([best.timestep, *(cell.timestep for cell in cells)]))[:count]
        behind = [cell.layer for cell in cells if cell.layer.startswith(("mid_block", "up_blocks"))]
        return cls(best.layer, best.timestep, tuple(layers), tuple(sorted(levels)), behind[0] if behind else None)


def compare_heads(
    denoiser: Denoiser,
    train: Any,
    test: Any,
    places: Selection | HeadPlaces,
    *,
    heads: Sequence[str] = tuple(HEADS),
    baselines: Sequence[str] = BASELINES,
    shares: Sequence[float] = (0.01, 0.1, 1.0),
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int = 30,
    protocol: MinibatchProtocol | None = None,
    head_options: Mapping[str, Mapping[str, Any]] | None = None,
    map_size: int = 8,
    prompt: str | None = None,
    class_labels: int | None = None,
    image_size: ImageSize = None,
    batch_size: int = 64,
    progress: Callable[[str], object] | None = None,
) -> HeadComparison:
    """Fit every head on the same features, and say which to take.

    All heads of gradient steps have one protocol: the same optimizer, rate, batch and epochs (vectors are
    standardised before, heads on maps bring their own norms). Each seed draws which labels are seen (smaller shares
    lie in larger ones, every class has one at least), the noise, the first weights and the order. The place is chosen
    before, by the same selection for all; the test images decide nothing. Features are read once a seed and kept; the
    network runs in every step for `diffeed` alone.

    Args:
        denoiser: Any `Denoiser`.
        train: Labelled images; see `Probe.fit`.
        test: The same, of the final scores; other images.
        places: What `select_features` chose on `train` and a validation split, or `HeadPlaces` of your own.
        heads: Of `HEADS`.
        baselines: `random`: a linear head on the same layer of the untrained network; `pixels`: on the pixels.
        shares: Of the training labels.
        seeds: One run each; three or more tell a spread.
        epochs: Of every head of gradient steps with all labels; with fewer as many more as give equally many steps.
        protocol: Instead of Adam at a rate of 1e-3, batches of 64, a cosine with two epochs of warm-up; for heads on
            maps too, so without standardisation.
        head_options: Head -> arguments of its class. The transformers are as wide as the layer that is read has
            channels, as in the papers, unless `width` says otherwise.
        map_size: Cells a side to which maps are averaged, at most.
        prompt: Of every image.
        class_labels: Condition of every image for class-conditional models; never the labels of the task.
        image_size: As in `FeatureExtractor`.
        batch_size: Images of a forward.
        progress: Called with a line at each step.

    Returns:
        A `HeadComparison`: `.choose(share)`, `.table()`, `.words()`, `.plot()`, `.save(folder)`.

    Raises:
        ValueError, TypeError: For heads, shares or data that do not exist or fit; before the first forward.
    """
    require_images(denoiser, "A comparison of heads")
    check_whole("epochs", epochs, 1)
    check_whole("map_size", map_size, 1)
    for name, known, given in (("heads", list(HEADS), heads), ("baselines", list(BASELINES), baselines)):
        wrong = [one for one in given if one not in known]
        if wrong or len(set(given)) < len(given):
            raise ValueError(f"{name}={list(given)}; expected some of {', '.join(known)}, each once.")
    if not heads or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"Give at least one head, and seeds, each once; got {list(heads)} and {list(seeds)}.")
    options = dict(head_options or {})
    if set(options) - set(heads):
        raise ValueError(f"head_options for {sorted(set(options) - set(heads))}, which are not among {list(heads)}.")
    data, _, names = open_classes(train)
    tested = class_data(test, "test")
    check_labels(tested, names)
    check_several_classes(data.targets, tested.targets)
    absent = sorted(set(range(len(names))) - set(data.targets.tolist()))
    if absent:
        raise ValueError(f"Classes {[names[at] for at in absent[:10]]} have no image in {data}; leave them out.")
    nested_rows([0], shares, [0])
    where = HeadPlaces.of(places) if isinstance(places, Selection) else places
    chosen = _protocol(protocol, epochs)
    bench = _Bench(
        denoiser, data, tested, where, chosen, options, map_size, (prompt, class_labels), image_size, batch_size,
        len(names), progress or (lambda line: None),
    )  # fmt: skip
    found: dict[tuple[str, float], list[_Run]] = {}
    skipped: dict[str, str] = {}
    for seed in seeds:
        bench.run(seed, heads, baselines, shares, found, skipped)
    scores = tuple(_score(name, share, runs) for (name, share), runs in found.items())
    recipe = {
        "model": denoiser.name if denoiser.name is None else public_name(denoiser.name),
        "model_class": type(plain_module(denoiser.model)).__name__,
        "train": {"dataset": public_name(data.name), "split": data.split, "rows": len(data)},
        "test": {"dataset": public_name(tested.name), "split": tested.split, "rows": len(tested)},
        "classes": len(names),
        "places": {name: getattr(where, name) for name in HeadPlaces.__dataclass_fields__},
        "protocol": chosen.describe(),
        "head_options": {name: dict(given) for name, given in options.items()},
        "map_size": map_size,
        "seeds": list(seeds),
    }
    return HeadComparison(scores, recipe, skipped)


@dataclass(frozen=True)
class _Run:
    """One fit."""

    accuracy: float
    rows: int
    forwards: float
    parameters: int
    seconds: float


@dataclass
class _Bench:
    """What stays the same for every fit of a comparison."""

    denoiser: Denoiser
    train: Labelled
    test: Labelled
    places: HeadPlaces
    protocol: MinibatchProtocol
    options: Mapping[str, Mapping[str, Any]]
    map_size: int
    condition: tuple[str | None, int | None]
    image_size: ImageSize
    batch_size: int
    classes: int
    tell: Callable[[str], object]
    compared: bool = False  # whether train and test have been looked through for shared images

    def run(
        self,
        seed: int,
        heads: Sequence[str],
        baselines: Sequence[str],
        shares: Sequence[float],
        found: dict[tuple[str, float], list[_Run]],
        skipped: dict[str, str],
    ) -> None:
        """Every head with every share of the labels, under one seed."""
        labels = self.train.targets.tolist()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = nested_rows(labels, shares, order)
        for kind in ("vectors", "maps", "several", "network"):
            named = {name: HEADS[name][0] for name in heads if HEADS[name][1] == kind and name not in skipped}
            if kind == "vectors":
                named |= {name: "linear" for name in baselines}
            if kind == "network":
                for name in named:
                    self._feed(name, seed, parts, found, skipped)
            elif named:
                self._fit_kind(kind, named, seed, parts, found)

    def _fit_kind(
        self, kind: str, named: Mapping[str, str], seed: int, parts: Mapping[float, list[int]], found: Any
    ) -> None:
        cached: dict[str, tuple[Any, Any]] = {}
        for name, head in named.items():
            source = name if name in BASELINES else kind
            if source not in cached:
                cached[source] = self._features(source, seed)
            for share, rows in parts.items():
                run = self._fit(name, head, kind, cached[source], torch.tensor(rows), seed)
                found.setdefault((name, share), []).append(run)
                self.tell(f"seed {seed}: {name}, {share:.0%} of the labels: {run.accuracy:.3f}")

    def _features(self, source: str, seed: int) -> tuple[Any, Any]:
        """Of train and test: vectors `(N, D)`, or maps by layer."""
        if source == "pixels":
            resize, channels = self.denoiser.resize_to(self.image_size), self.denoiser.image_channels
            parts = [
                torch.cat([pixels.flatten(1) for _, pixels in data.pixels(self.batch_size, channels, resize)])
                for data in (self.train, self.test)
            ]
            return parts[0], parts[1]
        denoiser = untrained(self.denoiser, seed) if source == "random" else self.denoiser
        pooling = f"map:{self.map_size}" if source in ("maps", "several") else "mean"
        extractor = self.extractor(seed, source == "several", pooling, denoiser)
        keys: list[list[str]] = [[], []]
        both = [
            pooled_features(extractor, data, pooling, self.batch_size, self.condition, None, found)[0]
            for data, found in zip((self.train, self.test), keys, strict=True)
        ]
        if not self.compared:
            tell_overlap(keys[0], keys[1], str(self.train), str(self.test))
            self.compared = True
        return both[0], both[1]

    def extractor(
        self, seed: int, several: bool, pooling: str | None, denoiser: Denoiser | None = None
    ) -> FeatureExtractor:
        """The reader of one place or of several."""
        places = self.places
        layers = list(places.layers) if several else [places.layer]
        levels: list[LevelLike] = [NoiseLevel(timestep=t) for t in places.timesteps]
        return FeatureExtractor(
            denoiser or self.denoiser, layers, levels if several else NoiseLevel(timestep=places.timestep),
            pooling=pooling, batch_size=self.batch_size, seed=seed, image_size=self.image_size,
        )  # fmt: skip

    def _fit(self, name: str, head: str, kind: str, both: tuple[Any, Any], rows: Tensor, seed: int) -> _Run:
        generator, options = torch.Generator().manual_seed(seed), dict(self.options.get(name, {}))
        if head == "attention":
            options = {"width": width_for(both[0][self.places.layers[0] if kind == "several" else self.places.layer]),
                       **options}  # fmt: skip
        labels, start = self.train.targets[rows], time.perf_counter()
        common: dict[str, Any] = {"head": head, "generator": generator, **options}
        if kind == "vectors":
            protocol = None if head == "knn" else replace(self.protocol_for(len(rows)), standardize=True)
            result = fit_head(both[0][rows], labels, self.classes, protocol=protocol, **common)
            seconds = time.perf_counter() - start
            assert isinstance(result.head, PooledHead)
            with torch.no_grad():
                accuracy = accuracy_of(result.head, both[1], self.test.targets)
        else:
            levels = len(self.places.timesteps) if kind == "several" else 1
            taken = {path: one[:, rows] for path, one in both[0].items()}
            result = fit_map_head(
                taken, labels, self.classes, levels=levels, protocol=self.protocol_for(len(rows)), **common
            )
            seconds = time.perf_counter() - start
            accuracy = map_accuracy(result.head, both[1], self.test.targets)
        forwards = 0.0 if name == "pixels" else self._forwards(kind == "several")
        return _Run(accuracy, len(rows), forwards, _parameters(result.head), seconds)

    def _feed(self, name: str, seed: int, parts: Mapping[float, list[int]], found: Any, skipped: Any) -> None:
        try:
            if self.places.decoder is None:
                raise ValueError("no layer behind those that are fed was tried; HeadPlaces(decoder=...) names one")
            fit = FeedbackFit(
                self.extractor(seed, False, None).replace(layers=[self.places.decoder]), self.train, self.test,
                self.classes, self.map_size, self.condition, self.options.get(name, {}),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            skipped[name] = str(error)
            return
        for share, rows in parts.items():
            start = time.perf_counter()
            head = fit.fit(rows, self.protocol_for(len(rows)), seed)
            seconds = time.perf_counter() - start
            run = _Run(fit.accuracy(head), len(rows), fit.forwards(self._shares()), _parameters(head), seconds)
            found.setdefault((name, share), []).append(run)
            self.tell(f"seed {seed}: {name}, {share:.0%} of the labels: {run.accuracy:.3f}")

    def protocol_for(self, rows: int) -> MinibatchProtocol:
        """The protocol with as many steps on so many images as it takes on all."""
        every, own = (-(-count // min(self.protocol.batch_size, count)) for count in (len(self.train), rows))
        return self.protocol.replace(epochs=-(-self.protocol.epochs * every // own))

    def _shares(self) -> dict[str, float]:
        """Share of a forward that is spent when a layer is done."""
        return {layer.path: layer.flops_share for layer in list_layers(self.denoiser, detail="all")}

    def _forwards(self, several: bool) -> float:
        shares, places = self._shares(), self.places
        if several:
            return len(places.timesteps) * max(shares[path] for path in places.layers)
        return shares[places.layer]


def width_for(maps: Tensor) -> int:
    """Width of a transformer that reads maps `(..., C, h, w)`: C, as a multiple of its 8 attention heads."""
    return -(-maps.shape[-3] // 8) * 8


def _stage(path: str) -> str:
    parts = path.split(".")
    return ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]


def _protocol(given: MinibatchProtocol | None, epochs: int) -> MinibatchProtocol:
    usual = PROTOCOLS["adam-maps"]
    assert isinstance(usual, MinibatchProtocol)
    made = usual if given is None else given
    if not isinstance(made, MinibatchProtocol) or made.standardize or made.batch_norm or made.init_std:
        raise ValueError(
            "protocol must be one of gradient steps that suits heads on vectors and on maps alike: standardize=False, "
            "no batch_norm, no init_std. Vectors are standardised before."
        )
    return made.replace(epochs=epochs, warmup_epochs=min(made.warmup_epochs, epochs - 1))


def _parameters(head: nn.Module) -> int:
    count = sum(parameter.numel() for parameter in head.parameters())
    bank = getattr(head, "bank", None)
    return count + (bank.numel() if isinstance(bank, Tensor) else 0)


def _score(name: str, share: float, runs: Sequence[_Run]) -> HeadScore:
    seconds = sum(run.seconds for run in runs) / len(runs)
    first = runs[0]
    return HeadScore(
        name, share, first.rows, tuple(run.accuracy for run in runs), first.forwards, first.parameters, seconds,
        name in BASELINES,
    )  # fmt: skip


__all__ = ["BASELINES", "HEADS", "HeadPlaces", "compare_heads"]
