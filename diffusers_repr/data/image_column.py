"""Images of a data set as uint8 tensors of one size; those that cannot be read are named, and skipped if asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_repr.data.columns import Columns
from diffusers_repr.data.image_files import UnreadableImage
from diffusers_repr.data.masks import MaskColumn
from diffusers_repr.data.placement import Crop
from diffusers_repr.data.samples import SampleReader, TensorReader

BadImages = Literal["error", "skip"]
MAX_BAD_IN_A_ROW = 100
_logger = logging.getLogger(__name__)


class ImagePixels(Dataset):
    """The images of a column as uint8 CHW tensors of one size, with the masks and points of other columns.

    Args:
        data: Map-style data set.
        column: Of type `datasets.Image`.
        channels: 1 (grey) or 3 (RGB).
        size: (H, W); one number: square.
        cache: Decode all at once and keep them in memory.
        center_crop: As `to_uint8`.
        bad_images: What to do with one that cannot be read: `error`, or `skip`: the next readable row stands for it,
            whenever it is asked for, so that the order of a run stays a function of seed and place.
        mask_column: Of class ids of the pixels; needs `masks`.
        points_column: Of points.
        masks: Of the column of masks.
        max_points: Points of a row.

    Attributes:
        data: As given.
        column: As given.
        size: (H, W).
        mode: `L` or `RGB`.
        bad: Why each bad row found so far in this process is bad, by row.

    Raises:
        ValueError: For a wrong column, an empty split, another number of channels, a crop that does not fit.
        UnreadableImage: On access, for `bad_images="error"`; for `skip` after 100 bad ones in a row.
    """

    def __init__(
        self,
        data: datasets.Dataset,
        column: str,
        channels: int,
        size: int | tuple[int, int],
        cache: bool,
        center_crop: Crop = "fit",
        bad_images: BadImages = "error",
        mask_column: str | None = None,
        points_column: str | None = None,
        masks: MaskColumn | None = None,
        max_points: int = 1,
    ) -> None:
        if not isinstance(data.features.get(column), datasets.Image):
            found = {name: type(feature).__name__ for name, feature in data.features.items()}
            raise ValueError(f"No column {column!r} of type Image in {found}; choose by --image_column.")
        if len(data) == 0:
            raise ValueError("The split to train on has no image; choose by --dataset_name and --dataset_split.")
        if bad_images not in ("error", "skip"):
            raise ValueError(f"bad_images={bad_images!r}; allowed are 'error' and 'skip'.")
        self.data, self.column, self.bad_images = data, column, bad_images
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.mode = "L" if channels == 1 else "RGB"
        self.bad: dict[int, str] = {}
        rows = SampleReader(data.features, Columns(column, mask=mask_column, points=points_column), masks)
        self._reader = TensorReader(rows, channels, self.size, center_crop, max_points)
        self._raw = rows.undecoded(data.with_format(None).select_columns(rows.columns.used()))
        self._cached: dict[str, Tensor] | None = None
        self._sources: Tensor | None = None
        if cache:
            self._sources, self._cached = self.gather(range(len(data)))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[int, Tensor]:
        """`(row, pixels)`, as `sample`."""
        row, tensors = self.sample(index)
        return row, tensors["pixel_values"]

    def sample(self, index: int) -> tuple[int, dict[str, Tensor]]:
        """`(row, tensors)`: `row` is `index`, or the next readable row where `bad_images` skips; see `TensorReader`.

        Raises:
            UnreadableImage: See the class.
            IndexError: For a row that is not there.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)} images.")
        if self._cached is not None and self._sources is not None:
            return int(self._sources[index]), {name: held[index] for name, held in self._cached.items()}
        for row in range(index, index + min(MAX_BAD_IN_A_ROW, len(self))):
            row %= len(self)
            if row in self.bad:
                continue
            try:
                return row, self._reader.read(self._raw[row], row)
            except UnreadableImage as error:
                if self.bad_images == "error":
                    raise UnreadableImage(f"{error} Repair or drop it, or pass --bad_images skip.") from error
                self.bad[row] = str(error)
                _logger.warning("%s It is skipped (%d so far in this process).", error, len(self.bad))
        raise UnreadableImage(
            f"{min(MAX_BAD_IN_A_ROW, len(self))} images in a row cannot be read, from row {index} on; the first: "
            f"{self.bad[index]}"
        )

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `sample` for several rows at once, the tensors joined; from memory where they are cached."""
        if self._cached is not None and self._sources is not None:
            places = torch.tensor(list(indices))
            return self._sources[places], {name: held[places] for name, held in self._cached.items()}
        found = [self.sample(index) for index in indices]
        return torch.tensor([row for row, _ in found]), _stacked([tensors for _, tensors in found])

    def paths(self) -> list[str | None]:
        """Of every row the file of its image; None where the data hold the image itself."""
        column = self._raw.with_format("arrow")[:].column(0)
        return [path for chunk in column.chunks for path in chunk.field("path").to_pylist()]

    @property
    def annotated(self) -> bool:
        """Whether samples have masks or points."""
        return self._reader.rows.columns.used() != [self.column]

    def raw(self, row: int) -> dict[str, Any] | None:
        """Path and bytes of a row's image; None without one."""
        return self.stored(row)[self.column]

    def stored(self, row: int) -> dict[str, Any]:
        """A row as it is stored: images as path and bytes, points and masks of arrays as lists."""
        return self._raw[row]


def _stacked(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
