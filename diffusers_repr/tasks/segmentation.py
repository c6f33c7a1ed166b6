"""`Segmenter`: a class for every pixel, learned from a few annotated images, and how uncertain each is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from diffusers_repr.data.masked import Masked, image_size, open_masked, placed
from diffusers_repr.data.masks import black_and_white
from diffusers_repr.data.overlap import tell_overlap
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.images import image_items
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.noise_policy import pixel_keys
from diffusers_repr.features.source import FeatureSource
from diffusers_repr.heads import PixelEnsembleHead
from diffusers_repr.heads.fitting.pixels import DDPM_SEG, PixelProtocol
from diffusers_repr.hub.places import public_name
from diffusers_repr.metrics import ConfusionMatrix, EnsembleSums, image_scores
from diffusers_repr.tasks import segmentation_fit as fitting
from diffusers_repr.tasks.base import check_base, check_features
from diffusers_repr.tasks.formats import SEGMENTER, TaskFormat
from diffusers_repr.tasks.reading import bar_of, seed_of, texts_of
from diffusers_repr.tasks.recipe import Score, SegmentationRecipe
from diffusers_repr.tasks.saved import SavedTask
from diffusers_repr.tasks.segmentation_output import SegmentationOutput


class Segmenter(SavedTask):
    """A fitted ensemble of classifiers of pixels with its base model; call it with images.

    Made by `Segmenter.fit` or `Segmenter.from_pretrained`. The method is that of DDPM-Seg (arXiv 2112.03126).

    Args:
        head: The fitted head.
        recipe: Everything between an image and the head.
        denoiser: The base model.
        batch_size: Images read at a time.
        source: Where features come from, if not from a `FeatureExtractor` with the recipe's settings.
    """

    FORMAT: ClassVar[TaskFormat] = SEGMENTER
    BATCH_SIZE: ClassVar[int] = 8

    head: PixelEnsembleHead
    recipe: SegmentationRecipe

    def __init__(
        self,
        head: PixelEnsembleHead,
        recipe: SegmentationRecipe,
        denoiser: Denoiser,
        batch_size: int = 8,
        source: FeatureSource | None = None,
    ) -> None:
        super().__init__(head, recipe, denoiser, batch_size, source)

    @classmethod
    def fit(
        cls,
        source: Any,
        train: Any,
        validation: Any = None,
        *,
        layers: str | Sequence[str] | None = None,
        timestep: Any = None,
        preset: str | None = None,
        members: int = 10,
        hidden_features: Sequence[int] | None = None,
        protocol: PixelProtocol = DDPM_SEG,
        prompt: str | None = None,
        class_labels: int | None = None,
        label_names: Sequence[str] | None = None,
        ignore_index: int | None = 255,
        mask_column: str | None = None,
        store_dtype: str = "float32",
        batch_size: int = 8,
        base: str | None = None,
        base_revision: str | None = None,
        progress_bar: Callable[..., Any] | None = None,
        **settings: Any,
    ) -> Segmenter:
        """Read the features of annotated images once and train an ensemble on their pixels.

        Memory holds the maps of all images at their own resolution and one batch of images; the features of a pixel
        are read when it is its turn.

        Args:
            source: A `Denoiser`, a diffusers pipeline, a `FeatureExtractor` or another `FeatureSource`.
            train: `(images, masks)`, `ImageData` with masks, or a `datasets.Dataset` with a column of them.
            validation: The same, to measure on.
            layers: Full module paths; the last residual block of every decoder stage if nothing says another.
            timestep: Training timestep or `NoiseLevel`, or a list of them; three levels as in the paper if nothing
                says another.
            preset: Take layers, levels, noise and image size of a paper by name: `ddpm-seg`.
            members: Networks that vote.
            hidden_features: Their widths; the paper's if None.
            protocol: How they are trained.
            prompt: Prompt of every image.
            class_labels: Condition of a class-conditional model for every image; never the classes of pixels.
            label_names: Name of each class; those of the data, or its ids, if None.
            ignore_index: Id of pixels of no class, of a tuple or `Dataset`; None: there are none.
            mask_column: Of a `datasets.Dataset`; one named `mask` if None.
            store_dtype: Of the maps in memory: `float32`, or `float16` in half of it.
            batch_size: Images read at a time, and rows of one forward (ensemble members and levels counted) unless a
                source says that.
            base: Hub id or folder to write as the base, if not the one the model was loaded from.
            base_revision: Goes with `base`.
            progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`, e.g. tqdm.
            **settings: Further settings of `FeatureExtractor`: `noise`, `seed`, `image_size`, ...

        Raises:
            ValueError, TypeError: For layers, levels or data that do not exist or fit, masks of another size than
                their image or with unknown ids, and masks of one class alone. A warning tells of classes that are on
                no mask.
        """
        named = {"layers": layers, "timestep": timestep}
        settings |= {name: value for name, value in named.items() if value is not None}
        found, requested = fitting.make_source(source, preset, settings)
        if isinstance(found, FeatureExtractor) and found.batch_size is None:
            found = found.replace(batch_size=batch_size)
        data = open_masked(train, "train", label_names, ignore_index, mask_column)
        held = None
        if validation is not None:
            held = open_masked(validation, "validation", label_names or data.label_names, ignore_index, mask_column)
            tell_overlap(_keys(found, data), _keys(found, held), str(data), str(held))
        condition, seed = (prompt, class_labels), seed_of(found, settings)
        read = fitting.read_images(found, data, batch_size, condition, store_dtype, progress_bar)
        names = fitting.class_names(data, read.masks)
        kept = fitting.learnable(read.masks, names, protocol.min_pixels, data)
        device = found.denoiser.device
        ensemble, ends = fitting.train_ensemble(
            read, kept, found.layers, len(names), members, hidden_features, protocol, seed, device, progress_bar
        )
        told = {**protocol.describe(), "chosen": {"members": members, "steps": sum(ends.steps)}}
        recipe = fitting.make_recipe(found, data, read, names, told, condition, (base, base_revision), requested, seed)
        made = cls(ensemble, recipe, found.denoiser, batch_size, None if recipe.source is None else found)
        if held is not None:
            made.evaluate(held)
        return made

    def __call__(
        self, images: Any, prompt: str | Sequence[str] | None = None, class_labels: int | None = None
    ) -> SegmentationOutput:
        """Segment images.

        Args:
            images: PIL images, numpy arrays or tensors of any size; resized as in training, the masks back to theirs.
            prompt: One for all images or one per image; that of the recipe if None.
            class_labels: Condition of a class-conditional model; that of the recipe if None.

        Raises:
            ValueError: Without images, for prompts of another number, and features that are not those of the head.
            FloatingPointError: If features or logits are not numbers.
        """
        items = image_items(images)
        if not items:
            raise ValueError("No images: the list is empty. Pass at least one PIL image, array or tensor.")
        texts = texts_of(prompt, len(items))
        masks: list[Tensor] = []
        doubts: list[Tensor] = []
        scores = []
        for start in range(0, len(items), self.batch_size):
            part = items[start : start + self.batch_size]
            sums, _ = self._predict(part, texts(slice(start, start + len(part))), class_labels)
            labels, doubt = sums.labels().cpu(), sums.uncertainty().float().cpu()
            scores.append(image_scores(doubt))
            for image, label, one in zip(part, labels, doubt, strict=True):
                size = image_size(image)
                masks.append(torch.from_numpy(placed(label.numpy(), size)))
                doubts.append(nn.functional.interpolate(one[None, None], size, mode="bilinear")[0, 0])
        return SegmentationOutput(masks, doubts, torch.cat(scores), self.recipe.label_names)

    @torch.no_grad()
    def _predict(self, images: list[Any], prompt: Any, class_labels: Any) -> tuple[EnsembleSums, tuple[int, int]]:
        """What the ensemble says at the network's size, and that size."""
        output = self.source(
            images,
            prompt=self.recipe.prompt if prompt is None else prompt,
            class_labels=self.recipe.class_labels if class_labels is None else class_labels,
        )
        check_features(self.recipe, self.recipe.sizes(output), self.denoiser.name)
        size = fitting.network_size(output)
        device = self.head.last.weight.device
        maps = {layer: output.as_map(layer).to(device) for layer in self.recipe.layers}
        sums = self.head.predict(maps, size)
        if not bool(sums.probabilities().isfinite().all()):
            raise FloatingPointError(
                f"The logits of some of {len(images)} images are not finite: the head's weights are broken, or the "
                f"features of the base {self.denoiser.name or self.recipe.base.model_class!r} are too large."
            )
        return sums, size

    def evaluate(
        self,
        data: Any,
        *,
        record: bool = True,
        dataset: str | None = None,
        split: str | None = None,
        mask_column: str | None = None,
        ignore_index: int | None = 255,
        progress_bar: Callable[..., Any] | None = None,
    ) -> dict[str, float]:
        """Intersection over union on annotated images, over all of their pixels together, at the network's size.

        Args:
            data: As for `fit`; a tuple counts as the split `test`.
            record: Keep the scores in the recipe, so that they are saved and stand in the card.
            dataset: Name to record; that of the data if None.
            split: Split to record; that of the data if None.
            mask_column: As for `fit`.
            ignore_index: As for `fit`.
            progress_bar: As for `fit`.

        Returns:
            `mean_iou` (pixels without a class left out, mean over the classes that occur), `mean_iou_legacy` (as the
            paper's code counts), `pixel_accuracy`, `mean_score` (the mean of the images' scores of uncertainty),
            `rows`, and `iou: NAME` of every class that occurs.

        Raises:
            ValueError: If the data's classes are not those of the segmenter, no pixel has one, or masks of 0 and 255
                show one class alone.
        """
        names = self.recipe.label_names
        found = open_masked(data, "test", names, ignore_index, mask_column)
        if found.label_names is not None and list(found.label_names) != list(names):
            raise ValueError(
                f"{found} has the classes {found.label_names}; the segmenter has {list(names)}. Bring them to the "
                "same names in the same order."
            )
        matrix, scores, seen = ConfusionMatrix(len(names), found.ignore_index), [], set[int]()
        with bar_of(progress_bar, len(found)) as tell:
            for _, images, masks in found.batches(self.batch_size):
                sums, size = self._predict(images, None, None)
                truth = np.stack([placed(mask, size) for mask in masks])
                seen.update(np.unique(truth).tolist())
                matrix.update(sums.labels(), torch.from_numpy(truth))
                scores.append(image_scores(sums.uncertainty().float()).cpu())
                tell(len(images))
        hint = black_and_white(seen - {found.ignore_index}, found.ignore_index in seen, found.ignore_index)
        if hint and len(names) == 2:
            raise ValueError(f"The masks of {found} show one class alone, or none.{hint}")
        result = {
            "mean_iou": matrix.mean_iou(),
            "mean_iou_legacy": matrix.mean_iou("legacy"),
            "pixel_accuracy": matrix.accuracy(),
        }
        if record:
            for name, value in result.items():
                self.record(Score(name, value, dataset or public_name(found.name), split or found.split, len(found)))
        each = {f"iou: {name}": float(v) for name, v in zip(names, matrix.iou(), strict=True) if not v.isnan()}
        return {**result, "mean_score": float(torch.cat(scores).mean()), "rows": len(found), **each}

    def on(self, denoiser: Denoiser) -> Segmenter:
        """The same segmenter on another copy of its base.

        Args:
            denoiser: The base to read.

        Raises:
            ValueError: If it is another model than the segmenter was fitted on.
        """
        if denoiser is self.denoiser:
            return self
        check_base(denoiser, self.recipe)
        own = None if self.recipe.source is None else self.source
        return Segmenter(self.head, self.recipe, denoiser, self.batch_size, own)

    def __repr__(self) -> str:
        levels = ", ".join(f"{level.timestep:g}" for level in self.recipe.levels)
        height, width = self.recipe.image_size
        return (
            f"Segmenter({self.head.config['members']} members, {len(self.recipe.label_names)} classes, "
            f"base={self.recipe.base.name!r}, image_size=({height}, {width}),\n"
            f"    layers={list(self.recipe.layers)}, timesteps=[{levels}])"
        )


def _keys(source: FeatureSource, data: Masked) -> list[str]:
    """A hash of every image as the network sees it."""
    keys: list[str] = []
    for _, images, _ in data.batches(64):
        for image in images:
            keys += pixel_keys(source.denoiser.pixels(image, source.image_size))
    return keys


__all__ = ["Segmenter"]
