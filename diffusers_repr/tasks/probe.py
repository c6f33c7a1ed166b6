"""`Probe`: a head on the features of a diffusion model, with the recipe of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.source import FeatureSource
from diffusers_repr.heads import FeedbackExtractor, FeedbackHead
from diffusers_repr.heads.fitting.protocols import Classifier, Protocol
from diffusers_repr.hub.places import public_name
from diffusers_repr.sweep.selection import Selection
from diffusers_repr.tasks.base import check_features
from diffusers_repr.tasks.formats import PROBE, TaskFormat
from diffusers_repr.tasks.images import (
    class_accuracies,
    class_data,
    head_inputs,
    move_inputs,
    pooled_features,
    read_pooled,
    take_images,
)
from diffusers_repr.tasks.probe_fit import check_labels, fit_probe, make_source
from diffusers_repr.tasks.reading import seed_of, texts_of
from diffusers_repr.tasks.recipe import ProbeRecipe, Score
from diffusers_repr.tasks.saved import SavedTask


@dataclass(frozen=True)
class ProbeOutput:
    """What a probe says of a batch of images.

    Attributes:
        labels: Name of the likeliest class of each image.
        probabilities: `(B, K)` float32.
        label_names: Name of each class.
    """

    labels: list[str]
    probabilities: Tensor
    label_names: tuple[str, ...]

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The `k` likeliest classes of each image with their probabilities, likeliest first."""
        values, classes = self.probabilities.sort(dim=1, descending=True, stable=True)
        k = min(k, len(self.label_names))
        return [
            [(self.label_names[int(c)], float(v)) for v, c in zip(row[:k], ids[:k], strict=True)]
            for row, ids in zip(values, classes, strict=True)
        ]


class Probe(SavedTask):
    """A fitted head with its base model; call it with images.

    Made by `Probe.fit` or `Probe.from_pretrained`; `Probe(head, recipe, denoiser)` joins parts.

    Args:
        head: The fitted head.
        recipe: Everything between an image and the head.
        denoiser: The base model.
        batch_size: Images read at a time, and rows of one forward (ensemble members and levels counted).
        source: Where features come from, if not from a `FeatureExtractor` with the recipe's settings.
    """

    FORMAT: ClassVar[TaskFormat] = PROBE

    head: Classifier
    recipe: ProbeRecipe

    def __init__(
        self,
        head: Classifier,
        recipe: ProbeRecipe,
        denoiser: Denoiser,
        batch_size: int = 64,
        source: FeatureSource | None = None,
    ) -> None:
        super().__init__(head, recipe, denoiser, batch_size, source)
        if isinstance(head, FeedbackHead) and isinstance(self.source, FeatureExtractor):
            self.source = FeedbackExtractor.of(head, self.source)

    @classmethod
    def fit(
        cls,
        source: Any,
        train: Any,
        validation: Any = None,
        *,
        layers: str | Sequence[str] | None = None,
        timestep: Any = None,
        pooling: str | None = None,
        selection: Selection | None = None,
        use: str = "best",
        head: str = "linear",
        protocol: str | Protocol | None = None,
        head_options: Mapping[str, Any] | None = None,
        prompt: str | None = None,
        class_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        batch_size: int = 64,
        base: str | None = None,
        base_revision: str | None = None,
        progress_bar: Callable[..., Any] | None = None,
        **settings: Any,
    ) -> Probe:
        """Read the features of labelled images once and fit a head to them.

        Memory holds the pooled features of all images (N x D float32, where D sums over layers and levels; L-BFGS
        holds them once more in float64; maps of P x P cells P x P times as much) and one batch of images.

        Args:
            source: A `Denoiser`, a diffusers pipeline, a `FeatureExtractor` whose settings are taken, or another
                `FeatureSource`, whose maps are pooled.
            train: `ImageData`, a `datasets.Dataset`, or `(images, labels)` with class ids from 0.
            validation: The same, for tuning and the probe's validation score. Never the data of the final score.
            layers: Full module paths.
            timestep: Training timestep or `NoiseLevel`, or a list of them.
            pooling: `mean` (if nothing is said), `max` or `adaptive:P`; for heads on maps `map:P`, `map:16` if nothing
                is said.
            selection: Take layers, levels, noise and pooling from `select_features` instead.
            use: What of the selection: `best`, `layers` or `levels`.
            head: `linear`, `mlp`, `knn`; on maps `attention`, `convolution`; or a head of your own by its name in
                `register_head`.
            protocol: How the head is fitted; see `diffusers_repr.heads.PROTOCOLS`.
            head_options: Arguments of the head's class.
            prompt: Prompt of every image.
            class_labels: Condition of a class-conditional model for every image; never the labels of the task.
            label_names: Name of each class; those of the data, or its ids, if None.
            batch_size: Images read at a time, and rows of one forward (ensemble members and levels counted) unless an
                extractor or selection says that.
            base: Hub id or folder to write as the base, if not the one the model was loaded from.
            base_revision: Goes with `base`.
            progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`, e.g. tqdm.
            **settings: Further settings of `FeatureExtractor`: `noise`, `ensemble_size`, `seed`, `image_size`, ...

        Raises:
            ValueError, TypeError: For layers, levels, protocols or data that do not exist or fit, a validation split
                of one class, or one whose images are all in `train` (a warning tells of some that are); what can be
                checked is checked before the first forward.
        """
        named = {"layers": layers, "timestep": timestep, "pooling": pooling}
        settings |= {name: value for name, value in named.items() if value is not None}
        found, pooled = make_source(source, selection, use, settings, batch_size, head)
        fitted, recipe = fit_probe(
            found,
            train,
            validation,
            pooling=pooled,
            requested=settings.get("timestep"),
            seed=seed_of(found, settings),
            head=head,
            protocol=protocol,
            head_options=head_options or {},
            condition=(prompt, class_labels),
            label_names=label_names,
            batch_size=batch_size,
            base=(base, base_revision),
            progress_bar=progress_bar,
        )
        return cls(fitted, recipe, found.denoiser, batch_size, None if recipe.source is None else found)

    def logits(
        self, images: Any, *, prompt: str | Sequence[str] | None = None, class_labels: int | None = None
    ) -> Tensor:
        """Logits `(B, K)` float32; arguments as in a call.

        Raises:
            FloatingPointError: If they are not numbers.
        """
        pixels = to_pixels(images, self.denoiser.image_channels, self.recipe.image_size)
        texts = texts_of(self.recipe.prompt if prompt is None else prompt, len(pixels))
        class_labels = self.recipe.class_labels if class_labels is None else class_labels
        parts = []
        for start in range(0, len(pixels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            output = read_pooled(self.source, pixels[rows], self.recipe.pooling, texts(rows), class_labels)
            check_features(self.recipe, self.recipe.sizes(output), self.denoiser.name)
            with torch.no_grad():
                parts.append(self.head(move_inputs(head_inputs(output, self.recipe.layers), self.device)))
            if parts[-1].isnan().any():
                raise FloatingPointError(
                    f"The features or logits of images {start} to {start + len(pixels[rows]) - 1} are not finite: the "
                    f"weights of the base {self.denoiser.name or self.recipe.base.model_class!r} are broken, or its "
                    f"dtype ({self.denoiser.dtype}) is too narrow; try float32."
                )
        return torch.cat(parts)

    @property
    def device(self) -> torch.device:
        """Where the head is."""
        return next(iter(self.head.state_dict().values())).device

    @torch.no_grad()
    def _guesses(self, features: Any, count: int) -> Tensor:
        step = 256 if isinstance(features, dict) else 4096
        parts = (take_images(features, slice(start, start + step)) for start in range(0, count, step))
        return torch.cat([self.head(move_inputs(part, self.device)).argmax(1).cpu() for part in parts])

    def __call__(
        self, images: Any, prompt: str | Sequence[str] | None = None, class_labels: int | None = None
    ) -> ProbeOutput:
        """Label images.

        Args:
            images: PIL images, numpy arrays or tensors of any size; resized as in training.
            prompt: One for all images or one per image; that of the recipe if None.
            class_labels: Condition of a class-conditional model; that of the recipe if None.
        """
        probabilities = self.logits(images, prompt=prompt, class_labels=class_labels).softmax(1)
        names = self.recipe.label_names
        return ProbeOutput([names[int(i)] for i in probabilities.argmax(1)], probabilities, names)

    def evaluate(
        self,
        data: Any,
        *,
        record: bool = True,
        dataset: str | None = None,
        split: str | None = None,
        progress_bar: Callable[..., Any] | None = None,
    ) -> dict[str, float]:
        """Accuracy, and its mean over classes (`balanced_accuracy`), on labelled images.

        Args:
            data: As for `fit`; a tuple counts as the split `test`.
            record: Keep the scores in the recipe, so that they are saved and stand in the card.
            dataset: Name to record; that of the data if None.
            split: Split to record; that of the data if None.
            progress_bar: As for `fit`.

        Returns:
            `accuracy`, `balanced_accuracy` and `rows`.

        Raises:
            ValueError: If the data's classes are not those of the probe.
        """
        found = class_data(data, "test")
        check_labels(found, self.recipe.label_names)
        condition = (self.recipe.prompt, self.recipe.class_labels)
        features, *_ = pooled_features(
            self.source, found, self.recipe.pooling, self.batch_size, condition, progress_bar
        )
        result = class_accuracies(self._guesses(features, len(found)), found.targets)
        if record:
            for name, value in result.items():
                self.record(Score(name, value, dataset or public_name(found.name), split or found.split, len(found)))
        return {**result, "rows": len(found)}

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.timestep:g}" for level in self.recipe.levels)
        height, width = self.recipe.image_size
        return (
            f"Probe({type(self.head).__name__}, {len(self.recipe.label_names)} classes, "
            f"base={self.recipe.base.name!r}, image_size=({height}, {width}),\n"
            f"    layers={list(self.recipe.layers)}, timesteps=[{levels}], pooling={self.recipe.pooling!r})"
        )
