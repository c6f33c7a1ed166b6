"""What a segmenter says of images, and how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from diffusers_repr.denoiser.images import image_items, to_pixels
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.pictures.masks import heat, mask_over


@dataclass(frozen=True)
class SegmentationOutput:
    """What a segmenter says of a batch of images.

    Attributes:
        masks: Of each image the class ids of its pixels, `(H, W)` int64, at the image's own size.
        uncertainty: Of each image `(H, W)` float32, how much the members differ, in nats; 0 where all agree.
        scores: `(B,)`: the mean of the most uncertain tenth of an image's pixels.
        label_names: Name of each class.
    """

    masks: list[Tensor]
    uncertainty: list[Tensor]
    scores: Tensor
    label_names: tuple[str, ...]

    def pictures(self, images: Any) -> list[Image.Image]:
        """Of each image itself, the mask over it, and where it is uncertain (bright).

        Args:
            images: Those that were segmented.
        """
        highest = max(float(one.max()) for one in self.uncertainty)
        drawn = []
        for image, mask, doubt in zip(_pil(images), self.masks, self.uncertainty, strict=True):
            over = mask_over(image, mask.numpy(), len(self.label_names))
            drawn.append(image_grid([image.convert("RGB"), over, heat(doubt.numpy(), highest)], 3, side=128))
        return drawn


def _pil(images: Any) -> list[Image.Image]:
    """Images as pictures are drawn of them."""
    drawn = []
    for item in image_items(images):
        if isinstance(item, Image.Image):
            drawn.append(item)
            continue
        pixels = to_pixels(item, 3 if _channels(item) == 3 else 1)[0]
        array = ((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        drawn.append(Image.fromarray(array[..., 0] if array.shape[2] == 1 else array))
    return drawn


def _channels(image: Any) -> int:
    if image.ndim == 2:
        return 1
    return int(image.shape[0] if isinstance(image, Tensor) else image.shape[2])


__all__ = ["SegmentationOutput"]
