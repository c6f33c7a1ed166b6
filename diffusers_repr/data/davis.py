"""DAVIS 2017 (Pont-Tuset et al. 2017, arXiv 1704.00675): videos with the masks of their objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.data.image_files import read_decoded, read_image

DAVIS_URL = "https://davischallenge.org/davis2017/code.html"
_HOW = (
    f"Get DAVIS-2017-trainval-480p.zip from {DAVIS_URL} and unpack it; pass the folder DAVIS, which holds JPEGImages, "
    "Annotations and ImageSets."
)


@dataclass(frozen=True)
class MaskedVideo:
    """A video with masks.

    Attributes:
        name: Of the video.
        frames: Files, in order.
        masks: Files, one a frame.
    """

    name: str
    frames: tuple[Path, ...]
    masks: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.frames)

    def frame(self, at: int) -> Image.Image:
        """A frame, counted from 0."""
        return read_image(self.frames[at], f"Frame {at} of {self.name}", "RGB")

    def mask(self, at: int) -> Tensor:
        """`(H, W)` int64: the object of each pixel, 0 for none, 255 for pixels that do not count.

        Raises:
            ValueError: For a mask with colours instead of ids.
        """
        image = read_decoded(self.masks[at], f"Mask {at} of {self.name}")
        if image.mode not in ("P", "L", "1"):
            raise ValueError(f"{str(self.masks[at])!r} has mode {image.mode}; masks hold object ids (P or L).")
        return torch.from_numpy(np.asarray(image).astype(np.int64))


def load_davis(
    folder: str | Path, split: str = "val", resolution: str = "480p", limit: int | None = None
) -> list[MaskedVideo]:
    """Videos of a local copy, in the order of the split's list.

    Args:
        folder: `DAVIS`, or one above it.
        split: `val` is what papers report; `train` has masks, too.
        resolution: Name of a folder in `JPEGImages`.
        limit: The first videos, for a quick try.

    Raises:
        FileNotFoundError: If it, a video, or the masks of one are not there; says how to get it.
    """
    given = Path(folder).expanduser()
    lists = [root / "ImageSets" / "2017" / f"{split}.txt" for root in (given, given / "DAVIS")]
    found = next((file for file in lists if file.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"No DAVIS 2017 in {str(given)!r} (ImageSets/2017/{split}.txt). {_HOW}")
    root = found.parents[2]
    names = [line.strip() for line in found.read_text().splitlines() if line.strip()][:limit]
    return [_video(root, name, resolution) for name in names]


def _video(root: Path, name: str, resolution: str) -> MaskedVideo:
    name = Path(name).name
    frames = sorted((root / "JPEGImages" / resolution / name).glob("*.jpg"))
    if not frames:
        raise FileNotFoundError(f"No frames of {name!r} in {str(root / 'JPEGImages' / resolution)!r}. {_HOW}")
    masks = tuple(root / "Annotations" / resolution / name / f"{frame.stem}.png" for frame in frames)
    missing = next((mask for mask in masks if not mask.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"The mask {str(missing)!r} is missing. {_HOW}")
    return MaskedVideo(name, tuple(frames), masks)


__all__ = ["DAVIS_URL", "MaskedVideo", "load_davis"]
