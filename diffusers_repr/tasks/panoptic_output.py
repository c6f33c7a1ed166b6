"""What an open-vocabulary segmenter says of images, and how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.denoiser.images import image_items
from diffusers_repr.pictures.segments import segment_picture
from diffusers_repr.tasks.matches import as_pil


@dataclass(frozen=True)
class PanopticOutput:
    """What is where in a batch of images.

    Attributes:
        maps: Of each image its segments, at the image's own size.
        scores: Of each image, id of a segment -> probability of its class.
        class_maps: Of each image the class of every pixel, `(H, W)` int64: the sum over all queries decides, so that
            no pixel is void.
        names: Of the classes.
    """

    maps: list[PanopticMap]
    scores: list[dict[int, float]]
    class_maps: list[Tensor]
    names: tuple[str, ...]

    def segments(self, at: int = 0) -> list[tuple[str, float, int]]:
        """(name, score, pixels) of each segment of an image, the largest first."""
        found = self.maps[at]
        rows = [
            (self.names[label], self.scores[at][number], int((found.ids == number).sum()))
            for number, label in found.classes.items()
        ]
        return sorted(rows, key=lambda row: -row[2])

    def pictures(self, images: Any) -> list[Image.Image]:
        """Each image with its segments over it, every segment in a colour of its own, and their names below.

        Void is left as it is; what is small is drawn larger.

        Args:
            images: Those that were segmented.
        """
        drawn = []
        for at, (image, one) in enumerate(zip(image_items(images), self.maps, strict=True)):
            names = {n: f"{self.names[label]} {self.scores[at][n]:.2f}" for n, label in one.classes.items()}
            drawn.append(segment_picture(as_pil(image), one.ids.numpy(), names))
        return drawn


__all__ = ["PanopticOutput"]
