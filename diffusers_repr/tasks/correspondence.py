"""`Correspondence`: which point of one photograph is which of another, by the features of a diffusion model (DIFT)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.image_pairs import ImagePairs, PairPoints
from diffusers_repr.data.points import check_points
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features.source import FeatureSource, require_source
from diffusers_repr.metrics.cosine_map import CosineMap, sample_map
from diffusers_repr.metrics.nearest import Likeness, mutual_nearest
from diffusers_repr.metrics.pck import PCK, PCKReference, correct_points, pck, reference_length
from diffusers_repr.tasks.matches import Matches


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """An image as correspondence sees it; match it with as many others as you like, without reading it again.

    Attributes:
        map: `(C, h, w)` float32.
        size: (H, W) of the image itself, which points are in pixels of.
        image: As it was passed.
    """

    map: Tensor
    size: tuple[int, int]
    image: Any = None

    def at(self, points: Tensor) -> Tensor:
        """Features `(N, C)` of points `(N, 2)`; see `sample_map`."""
        return sample_map(self.map, points, self.size)

    def cell_centres(self) -> Tensor:
        """`(h * w, 2)` as (x, y): the middle of every cell of the map, row by row, in pixels."""
        h, w = self.map.shape[1:]
        y, x = ((torch.arange(n) + 0.5) * (length / n) - 0.5 for n, length in zip((h, w), self.size, strict=True))
        return torch.stack([x.repeat(h), y.repeat_interleave(w)], dim=1).float()


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


class Correspondence:
    """Finds points of one image in another: the nearest feature by cosine, without any training (DIFT).

    Tang et al. 2023 (arXiv 2306.03881): features of one layer at one noise level, brought to the image's size
    bilinearly; a point's match is the pixel whose feature is most like its own. Nothing of the image's size and C
    channels is made, see `CosineMap`; the result is the same.

    Args:
        source: What reads features: a `FeatureExtractor`, or any other `FeatureSource`.
        layer: Which of its layers; None where it gives one.
        chunk: Points at a time; None: as many as 32 MiB of similarities hold.

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

    def __init__(self, source: FeatureSource, layer: str | None = None, *, chunk: int | None = None) -> None:
        self.source, self.chunk = require_source(source), chunk
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
            prompt: Of text models; the empty one if None. DIFT's on SPair-71k is "a photo of a {category}".
            class_labels: Of class-conditional models; the null class, if there is one, if None.
            embeddings: Ready network inputs.
            image_id: Key of the noise; the pixels if None, so that one image always gets the same.

        Raises:
            ValueError: For several images, an image that does not suit the model, or a map of one cell.
        """
        pixels = to_pixels(image, self.source.denoiser.image_channels)
        if len(pixels) != 1:
            raise ValueError(f"One image at a time; got {len(pixels)}.")
        ids = None if image_id is None else [image_id]
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
        prompts, labels = _both(prompt, str, "prompt"), _both(class_labels, int, "class_labels")
        _check_options(points, target_points, likeness, similarity)
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
            found = _mutual(a, b, a.cell_centres() if asked is None else asked, among, likeness)
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

    @torch.no_grad()
    def evaluate(
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
            prompt: Of text models; `{category}` stands for the pair's category. The empty one if None.
            progress_bar: As in `FeatureExtractor`: `progress_bar(total=n)`.

        Raises:
            ValueError: For pairs without a box, with `reference="box"`; without any point.
        """
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


def fill_prompt(prompt: str | None, category: str | None) -> str | None:
    """A prompt with the name of a category; without a name, of one that asks for it, the empty prompt.

    So does DIFT's code for objects that it has no prompt of.

    Example:
        >>> fill_prompt("a photo of a {category}", "cat"), fill_prompt("a photo of a {category}", None)
        ('a photo of a cat', '')
    """
    if prompt is None or "{category}" not in prompt:
        return prompt
    return "" if category is None else prompt.replace("{category}", category)


def _key(pair: PairPoints, side: str) -> tuple[int, str | None]:
    return (pair.source if side == "source" else pair.target), pair.category


def _mutual(a: ImageFeatures, b: ImageFeatures, points: Tensor, among: Tensor | None, likeness: Likeness) -> Matches:
    others = b.cell_centres() if among is None else among
    found = mutual_nearest(a.at(points), b.at(others), likeness)
    first, second = found.first.cpu(), found.second.cpu()
    return Matches(points[first].float(), others[second].float(), found.scores.cpu(), a.size, b.size)


def _check_options(points: Any, target_points: Any, likeness: str, similarity: bool) -> None:
    if points is None and target_points is not None:
        raise ValueError("target_points are candidates for points of the source; pass points, too.")
    if likeness not in ("cosine", "l2"):
        raise ValueError(f"likeness is 'cosine' or 'l2'; got {likeness!r}.")
    if likeness == "l2" and (target_points is None and points is not None):
        raise ValueError(
            "likeness='l2' is of mutual nearest neighbours: pass target_points, too, or no points. Single points are "
            "matched by cosine."
        )
    if likeness == "l2" and similarity:
        raise ValueError("Similarity maps are cosines; pass similarity=False with likeness='l2'.")


def _both(value: Any, kind: type, name: str) -> tuple[Any, Any]:
    """What is asked of the source image and of the target."""
    if value is None or isinstance(value, kind):
        return value, value
    values = list(value)
    if len(values) != 2:
        raise ValueError(f"{name} is one for both images, or two; got {len(values)}.")
    return values[0], values[1]


def grid_points(size: tuple[int, int], count: int) -> Tensor:
    """About so many points spread evenly over an image, `(N, 2)` as (x, y).

    Args:
        size: (H, W).
        count: Of points; as many rows and columns as make the cells square.

    Example:
        >>> grid_points((20, 40), 2)
        tensor([[ 9.5000,  9.5000],
                [29.5000,  9.5000]])
    """
    h, w = size
    columns = max(1, round(math.sqrt(count * w / h)))
    rows = max(1, round(count / columns))
    x = (torch.arange(columns) + 0.5) * (w / columns) - 0.5
    y = (torch.arange(rows) + 0.5) * (h / rows) - 0.5
    return torch.stack([x.repeat(rows), y.repeat_interleave(columns)], dim=1)


__all__ = ["Correspondence", "ImageFeatures", "PCKReport", "fill_prompt", "grid_points"]
