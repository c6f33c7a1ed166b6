"""Pairs of images with points that belong together: what correspondence is measured on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.data.image_files import read_image
from diffusers_repr.data.points import check_points


@dataclass(frozen=True)
class PairPoints:
    """Key points of two images that belong together, one to one.

    Attributes:
        source: Place of the source image among the images.
        target: Place of the target image.
        source_points: `(N, 2)` as (x, y) in pixels of the source image.
        target_points: `(N, 2)` in pixels of the target image.
        box: Of the object in the target image: left, top, right, bottom; None: not known.
        category: Of the object, for prompts and for numbers by category.
        name: Of the pair.
    """

    source: int
    target: int
    source_points: Tensor
    target_points: Tensor
    box: tuple[float, float, float, float] | None = None
    category: str | None = None
    name: str = ""


@dataclass(frozen=True)
class ImagePairs:
    """Images, read when they are asked for, and the pairs among them: an image in several pairs is held once.

    Attributes:
        images: Paths or PIL images.
        pairs: The pairs.
        name: Of the data set, for messages and records.
        sizes: (H, W) of each image, where known without reading it.

    Raises:
        ValueError: Without a pair; for a pair of images that are not there, or unequal numbers of points.
    """

    images: Sequence[Any]
    pairs: tuple[PairPoints, ...]
    name: str = "pairs"
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError(f"{self.name}: there are no pairs.")
        for at, pair in enumerate(self.pairs):
            if not (0 <= pair.source < len(self.images) and 0 <= pair.target < len(self.images)):
                raise ValueError(
                    f"{self.name}: pair {at} is of images {pair.source} and {pair.target}; there are "
                    f"{len(self.images)}, counted from 0."
                )
            if len(pair.source_points) != len(pair.target_points):
                raise ValueError(
                    f"{self.name}: pair {at} has {len(pair.source_points)} points in the source image and "
                    f"{len(pair.target_points)} in the target; they belong together one to one."
                )

    @classmethod
    def from_list(cls, pairs: Sequence[Any], name: str = "pairs") -> ImagePairs:
        """Pairs of one's own.

        Args:
            pairs: `(source, target, source_points, target_points)`, with a box of the object in the target image as a
                fifth value if there is one. Images are PIL images or paths; points N times (x, y) in their pixels. The
                same image object, or path, in several pairs is read once.
            name: Of the set.

        Raises:
            TypeError: For anything else.
            ValueError: For points outside of their image, or unequal numbers of them; for no pairs.
        """
        places: dict[Any, int] = {}
        images: list[Any] = []
        made = []
        sizes: dict[int, tuple[int, int]] = {}
        for at, pair in enumerate(pairs):
            if not isinstance(pair, (tuple, list)) or len(pair) not in (4, 5):
                raise TypeError(
                    f"{name}: pair {at} must be (source, target, source_points, target_points) or with a box; got "
                    f"{type(pair).__name__}" + (f" of {len(pair)}." if hasattr(pair, "__len__") else ".")
                )
            found, points = [], []
            for image, given, side in zip(pair[:2], pair[2:4], ("source", "target"), strict=True):
                image = Path(image) if isinstance(image, str) else image
                key = image if isinstance(image, Path) else id(image)
                if key not in places:
                    places[key] = len(images)
                    images.append(image)
                    opened = _open(image, f"{name}: the {side} image of pair {at}")
                    sizes[places[key]] = (opened.height, opened.width)
                found.append(places[key])
                points.append(check_points(given, sizes[found[-1]], f"{name}: {side}_points of pair {at}"))
            box = None if len(pair) == 4 or pair[4] is None else _box(pair[4])
            made.append(PairPoints(found[0], found[1], points[0], points[1], box))
        return cls(images, tuple(made), name, sizes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __str__(self) -> str:
        return self.name

    def image(self, at: int) -> Image.Image:
        """An image, turned as its EXIF data says.

        Raises:
            UnreadableImage: If it cannot be read.
        """
        return _open(self.images[at], f"{self.name}: image {at}")

    def size(self, at: int) -> tuple[int, int]:
        """(H, W) of an image."""
        if at in self.sizes:
            return self.sizes[at]
        opened = self.image(at)
        return opened.height, opened.width

    def select(self, keep: Callable[[PairPoints], bool]) -> ImagePairs:
        """The pairs for which a function is true, with the same images.

        Raises:
            ValueError: If there are none.
        """
        return ImagePairs(self.images, tuple(filter(keep, self.pairs)), self.name, self.sizes)

    def first(self, count: int) -> ImagePairs:
        """The first pairs, for a quick try."""
        return ImagePairs(self.images, self.pairs[:count], self.name, self.sizes)

    def by_target(self) -> Iterator[tuple[int, list[PairPoints]]]:
        """Each target image with its pairs, in the order in which targets come first."""
        held: dict[int, list[PairPoints]] = {}
        for pair in self.pairs:
            held.setdefault(pair.target, []).append(pair)
        yield from held.items()


def _open(image: Any, what: str) -> Image.Image:
    return read_image(image, what) if isinstance(image, Path) else _as_pil(image, what)


def _as_pil(image: Any, what: str) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"{what} must be a path or a PIL image; got {type(image).__name__}.")
    return image


def _box(value: Any) -> tuple[float, float, float, float]:
    found = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    if len(found) != 4:
        raise ValueError(f"A box is left, top, right, bottom; got {value!r}.")
    return found[0], found[1], found[2], found[3]


__all__ = ["ImagePairs", "PairPoints"]
