"""`Correspondence`: which point of one photograph is which of another, by the features of a diffusion model (DIFT)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffusers_repr.data.image_pairs import ImagePairs, PairPoints
from diffusers_repr.data.points import check_points
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features.source import FeatureSource, require_source
from diffusers_repr.hub.places import public_name
from diffusers_repr.metrics.cosine_map import CosineMap
from diffusers_repr.metrics.nearest import Likeness
from diffusers_repr.metrics.pck import PCK, PCKReference, correct_points, pck, reference_length
from diffusers_repr.tasks.correspondence_source import choose_source, matcher_recipe
from diffusers_repr.tasks.formats import MATCHER, TaskFormat
from diffusers_repr.tasks.image_features import ImageFeatures, check_options, fill_prompt, for_both, mutual_matches
from diffusers_repr.tasks.matches import Matches
from diffusers_repr.tasks.reading import check_source
from diffusers_repr.tasks.recipe import MatcherRecipe, Score
from diffusers_repr.tasks.saved import SavedTask


@dataclass(frozen=True)
class PCKReport:
    """PCK of a set of pairs.

    Attributes:
        all: Over all pairs.
        categories: Of each category of objects, where pairs tell theirs.
        reference: `box` or `image`.
    """

    all: PCK
    categories: Mapping[str, PCK]
    reference: PCKReference


class Correspondence(SavedTask):
    """Finds points of one image in another: the nearest feature by cosine, without any training (DIFT).

    Tang et al. 2023 (arXiv 2306.03881): features of one layer at one noise level, brought to the image's size
    bilinearly; a point's match is the pixel whose feature is most like its own. Nothing of the image's size and C
    channels is made, see `CosineMap`; the result is the same.

    Args:
        source: What reads features: a `FeatureExtractor`, or any other `FeatureSource`.
        layer: Which of its layers; None where it gives one.
        chunk: Points at a time; None: as many as 32 MiB of similarities hold.
        prompt: Of every image, unless another is given in the call; `{category}` stands for the category of a pair.
        class_labels: Of every image, unless another is given in the call.

    Raises:
        TypeError: For what is no source.
        ValueError: For a layer that it does not give, several without a choice, several levels, or pooled features.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> from diffusers_repr import Denoiser, FeatureExtractor
        >>> unet = UNet2DModel(32, 3, 3, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> task = Correspondence(FeatureExtractor(Denoiser(unet, DDPMScheduler()), "up_blocks.0", 100))
        >>> photo = torch.rand(3, 40, 60)
        >>> task(photo, photo, [[12, 30], [50, 5]]).matches
        tensor([[12., 30.],
                [50.,  5.]])
    """

    FORMAT: ClassVar[TaskFormat] = MATCHER

    def __init__(
        self,
        source: FeatureSource,
        layer: str | None = None,
        *,
        chunk: int | None = None,
        prompt: str | None = None,
        class_labels: int | None = None,
    ) -> None:
        # Nothing is fitted, so there is no head; the recipe is written when it is asked for, since it reads an image.
        self.source, self.chunk = require_source(source), chunk
        self.head, self.denoiser = None, source.denoiser
        self.prompt, self.class_labels = prompt, class_labels
        self._recipe: MatcherRecipe | None = None
        layers = list(source.layers)
        if layer is None and len(layers) > 1:
            raise ValueError(f"The source gives {len(layers)} layers; choose one by layer=: {', '.join(layers)}.")
        if layer is not None and layer not in layers:
            raise ValueError(f"The source gives no layer {layer!r}; it gives {', '.join(layers)}.")
        if getattr(source, "many", False):
            raise ValueError("The source reads several noise levels; correspondence takes one: timestep=261, no list.")
        if getattr(source, "pooling", None) is not None:
            raise ValueError(f"The source pools its features ({source.pooling}); pass one with pooling=None.")  # type: ignore[attr-defined]
        self.layer = layers[0] if layer is None else layer

    @classmethod
    def fit(
        cls,
        source: Any,
        train: Any = None,
        validation: Any = None,
        *,
        layers: str | Sequence[str] | None = None,
        timestep: Any = None,
        preset: str | None = None,
        alpha: float = 0.1,
        reference: PCKReference = "box",
        prompt: str | None = None,
        class_labels: int | None = None,
        progress_bar: Callable[..., Any] | None = None,
        **settings: Any,
    ) -> Correspondence:
        """Take a setting of a paper's, or one's own, or choose layer and level by PCK on pairs; no weights are made.

        Args:
            source: A `Denoiser`, a diffusers pipeline, a `FeatureExtractor` or another `FeatureSource`.
            train: Pairs to choose on; see `evaluate`. None: nothing is chosen.
            validation: Pairs to measure on.
            layers: The layer; those to choose from, with `train`.
            timestep: Training timestep or `NoiseLevel`; the list of those to choose from, with `train`.
            preset: As in `correspondence_source`.
            alpha: Of the PCK that is chosen by.
            reference: Likewise.
            prompt: Of every image; `{category}` stands for the category of a pair. The preset's if None.
            class_labels: Of class-conditional models.
            progress_bar: As in `evaluate`.
            **settings: Further settings of `FeatureExtractor`: `noise`, `ensemble_size`, `seed`, `image_size`, ...

        Raises:
            ValueError: For layers and levels that do not exist, none to choose from, and pairs for a source whose
                layer and level are its own.
        """
        named = {"layers": layers, "timestep": timestep, "preset": preset}
        settings |= {name: value for name, value in named.items() if value is not None}
        train = ImagePairs.from_list(train) if isinstance(train, (list, tuple)) else train
        found, own = choose_source(source, train, settings, alpha, reference, prompt, class_labels)
        task = cls(found, prompt=own if prompt is None else prompt, class_labels=class_labels)
        if train is not None:
            task.recipe = replace(task.recipe, chosen_on={"dataset": public_name(str(train)), "pairs": len(train)})
        if validation is not None:
            task.evaluate(validation, alpha=alpha, reference=reference, split="validation", progress_bar=progress_bar)
        return task

    @classmethod
    def _joined(
        cls, head: None, recipe: MatcherRecipe, denoiser: Denoiser, batch_size: int, source: FeatureSource | None
    ) -> Self:
        if source is None:
            check_source(recipe, None)
        source = recipe.extractor(denoiser, batch_size=batch_size) if source is None else source
        made = cls(source, recipe.layers[0], prompt=recipe.prompt, class_labels=recipe.class_labels)
        made.recipe = recipe
        return made

    @property
    def recipe(self) -> MatcherRecipe:
        """Everything between an image and its features, and what was measured; reads one grey image, once."""
        if self._recipe is None:
            self._recipe = matcher_recipe(self.source, self.layer, (self.prompt, self.class_labels))
        return self._recipe

    @recipe.setter
    def recipe(self, recipe: MatcherRecipe) -> None:
        self._recipe = recipe

    @torch.no_grad()
    def encode(
        self,
        image: Any,
        *,
        prompt: str | None = None,
        class_labels: int | None = None,
        embeddings: Mapping[str, Any] | None = None,
        image_id: str | int | None = None,
    ) -> ImageFeatures:
        """Read the features of an image.

        Args:
            image: PIL image, numpy array (H, W, C) or tensor (C, H, W), of any size.
            prompt: Of text models; the task's, else the empty one, if None. DIFT's on SPair-71k is "a photo of a
                {category}".
            class_labels: Of class-conditional models; the task's, else the null class, if there is one, if None.
            embeddings: Ready network inputs.
            image_id: Key of the noise; the pixels if None, so that one image always gets the same.

        Raises:
            ValueError: For several images, an image that does not suit the model, or a map of one cell.
        """
        pixels = to_pixels(image, self.source.denoiser.image_channels)
        if len(pixels) != 1:
            raise ValueError(f"One image at a time; got {len(pixels)}.")
        ids = None if image_id is None else [image_id]
        prompt = fill_prompt(self.prompt, None) if prompt is None else prompt
        class_labels = self.class_labels if class_labels is None else class_labels
        output = self.source(image, prompt=prompt, class_labels=class_labels, embeddings=embeddings, ids=ids)
        found = output.as_map(self.layer)
        if found.ndim != 4 or len(found) != 1:
            raise ValueError(f"Layer {self.layer!r} gave {tuple(found.shape)}; a map (1, C, h, w) was expected.")
        if found[0, 0].numel() < 2:
            raise ValueError(
                f"Layer {self.layer!r} sees this image as one cell, so that all its points are alike. Pass a larger "
                "image_size to the source, or take a layer with a smaller stride: `list_layers(denoiser)` shows it."
            )
        return ImageFeatures(found[0].float(), (pixels.shape[2], pixels.shape[3]), image)

    @torch.no_grad()
    def __call__(
        self,
        source: Any,
        target: Any,
        points: Any = None,
        target_points: Any = None,
        *,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | None = None,
        embeddings: Mapping[str, Any] | None = None,
        likeness: Likeness = "cosine",
        cycle: bool = False,
        similarity: bool = False,
    ) -> Matches:
        """Match points of `source` in `target`.

        Args:
            source: An image, or what `encode` made of it.
            target: The same; of another size if need be.
            points: N times (x, y) in pixels of the source, the centre of the first pixel at (0, 0): each gets the
                pixel of the target that is most like it. None: the middles of all cells of both maps are compared,
                and those that choose each other are matched.
            target_points: Where given, only these are candidates, and mutual nearest neighbours match (HPatches).
            prompt: One for both images, or one each.
            class_labels: The same.
            embeddings: Ready network inputs, for both.
            likeness: Of mutual neighbours: `cosine` or `l2`.
            cycle: Match back, too, and tell by how many pixels the way back misses each point.
            similarity: Keep the similarity map of each point.

        Raises:
            ValueError: For points outside of their image (says so if they would lie inside as (y, x)), target points
                without points, or options that do not go together.
        """
        prompts, labels = for_both(prompt, str, "prompt"), for_both(class_labels, int, "class_labels")
        check_options(points, target_points, likeness, similarity)
        a, b = (
            given
            if isinstance(given, ImageFeatures)
            else self.encode(given, prompt=prompts[at], class_labels=labels[at], embeddings=embeddings)
            for at, given in enumerate((source, target))
        )
        asked = None if points is None else check_points(points, a.size, "points")
        among = None if target_points is None else check_points(target_points, b.size, "target_points")
        if asked is not None and among is None:
            found = self._to_pixels(a, b, asked, similarity)
        else:
            found = mutual_matches(a, b, a.cell_centres() if asked is None else asked, among, likeness)
            if similarity:
                maps = CosineMap(b.map, b.size, self.chunk)(a.at(found.points))
                found = replace(found, similarity=maps)
        if cycle:
            back = CosineMap(a.map, a.size, self.chunk).best(b.at(found.matches)).points.cpu()
            found = replace(found, cycle=(back - found.points).norm(dim=1))
        return replace(found, source=a.image, target=b.image)

    def _to_pixels(self, a: ImageFeatures, b: ImageFeatures, points: Tensor, similarity: bool) -> Matches:
        cosine, vectors = CosineMap(b.map, b.size, self.chunk), a.at(points)
        best = cosine.best(vectors)
        maps = cosine(vectors).cpu() if similarity else None
        return Matches(
            points.float(), best.points.cpu(), best.scores.cpu(), a.size, b.size, similarity=maps
        )  # fmt: skip

    def evaluate(
        self,
        data: Any,
        *,
        record: bool = True,
        alpha: float = 0.1,
        reference: PCKReference = "box",
        prompt: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        progress_bar: Callable[..., Any] | None = None,
    ) -> dict[str, float]:
        """PCK of annotated pairs.

        Args:
            data: `ImagePairs`, or a list of `(source, target, source_points, target_points)`; see `pck_report`.
            record: Keep the scores in the recipe, so that they are saved and stand in the card.
            alpha: As in `pck_report`.
            reference: Likewise.
            prompt: Likewise.
            dataset: Name to record; that of the pairs if None.
            split: Split to record; `test` if None.
            progress_bar: As in `pck_report`.

        Returns:
            `pck` (all points alike), `pck_per_image` (all pairs alike), `points`, `rows` (pairs with points), and
            `pck: NAME` of every category that has points.

        Raises:
            ValueError: As `pck_report`.
        """
        pairs = data if isinstance(data, ImagePairs) else ImagePairs.from_list(data)
        found = self.pck_report(pairs, alpha=alpha, reference=reference, prompt=prompt, progress_bar=progress_bar)
        result = {"pck": found.all.per_point, "pck_per_image": found.all.per_image}
        if record:
            for name, value in result.items():
                told = f"{name} at {alpha:g} of the {reference}"
                self.record(Score(told, value, dataset or public_name(pairs.name), split or "test", found.all.pairs))
        each = {f"pck: {name}": own.per_point for name, own in found.categories.items()}
        return {**result, "points": found.all.points, "rows": found.all.pairs, **each}

    @torch.no_grad()
    def pck_report(
        self,
        pairs: ImagePairs,
        *,
        alpha: float = 0.1,
        reference: PCKReference = "box",
        prompt: str | None = None,
        progress_bar: Any = None,
    ) -> PCKReport:
        """PCK of annotated pairs (SPair-71k's protocol), each image read at most twice however many pairs it is in.

        Args:
            pairs: See `ImagePairs`, `load_spair`.
            alpha: Share of the reference length that a match may be off, the bound included.
            reference: `box` of the object in the target image, or the `image`.
            prompt: Of text models; `{category}` stands for the pair's category. The task's, else the empty one, if
                None.
            progress_bar: As in `FeatureExtractor`: `progress_bar(total=n)`.

        Raises:
            ValueError: For pairs without a box, with `reference="box"`; without any point.
        """
        prompt = self.prompt if prompt is None else prompt
        for pair in pairs.pairs:  # before the first forward
            reference_length(reference, (1, 1), pair.box)
        steps = len({_key(pair, "source") for pair in pairs.pairs}) + len({_key(p, "target") for p in pairs.pairs})
        bar = None if progress_bar is None else progress_bar(total=steps)
        correct: dict[int, Tensor] = {}
        try:
            vectors: dict[int, Tensor] = {}
            for found, held in self._read(pairs, "source", prompt, bar):
                for at, pair in held:
                    vectors[at] = found.at(pair.source_points).cpu()
            for found, held in self._read(pairs, "target", prompt, bar):
                cosine = CosineMap(found.map, found.size, self.chunk)
                for at, pair in held:
                    length = reference_length(reference, found.size, pair.box)
                    best = cosine.best(vectors.pop(at)).points
                    correct[at] = correct_points(best, pair.target_points, length, alpha)
        finally:
            if bar is not None:
                bar.close()
        shares = [correct[at] for at in range(len(pairs))]
        categories = sorted({pair.category for pair in pairs.pairs if pair.category is not None})
        own = {
            name: [one for one, pair in zip(shares, pairs.pairs, strict=True) if pair.category == name]
            for name in categories
        }
        return PCKReport(pck(shares, alpha), {name: pck(of, alpha) for name, of in own.items() if any(map(len, of))},
                         reference)  # fmt: skip

    def _read(
        self, pairs: ImagePairs, side: str, prompt: str | None, bar: Any
    ) -> Iterator[tuple[ImageFeatures, list[tuple[int, PairPoints]]]]:
        """Each image of a side once, with its pairs."""
        held: dict[tuple[int, str | None], list[tuple[int, PairPoints]]] = {}
        for at, pair in enumerate(pairs.pairs):
            held.setdefault(_key(pair, side), []).append((at, pair))
        for (image, category), own in held.items():
            yield self.encode(pairs.image(image), prompt=fill_prompt(prompt, category)), own
            if bar is not None:
                bar.update(1)


def _key(pair: PairPoints, side: str) -> tuple[int, str | None]:
    return (pair.source if side == "source" else pair.target), pair.category


__all__ = ["Correspondence", "PCKReport"]
