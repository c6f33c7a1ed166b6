"""The images of a column as uint8 tensors of one size; those that cannot be read are named, and skipped if asked."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import datasets
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffusers_repr.data.image_files import UnreadableImage, place_of, read_image, undecoded
from diffusers_repr.data.transforms import Crop, check_crop, to_uint8

BadImages = Literal["error", "skip"]
MAX_BAD_IN_A_ROW = 100
_logger = logging.getLogger(__name__)


class ImageReader:
    """Rows of undecoded images to uint8 tensors.

    Args:
        feature: The `datasets.Image` of the column.
        channels: 1 or 3.
        size: (H, W).
        crop: As `to_uint8`.
    """

    def __init__(self, feature: datasets.Image, channels: int, size: tuple[int, int], crop: Crop) -> None:
        check_crop(crop, size)
        if channels not in (1, 3):
            raise ValueError(f"`model` has in_channels={channels}; images have 1 (grey) or 3 (RGB).")
        self._mode = feature.mode
        self.channels, self.size, self.crop = channels, size, crop

    def open(self, value: Any, row: int) -> Image.Image:
        """The decoded image of a row, turned as its EXIF data says.

        Args:
            value: Path and bytes, as `datasets.Image(decode=False)` gives them, or an image.
            row: For the message.

        Raises:
            UnreadableImage: If there is none, or as `read_image`.
        """
        if value is None:
            raise UnreadableImage(f"Row {row} has no image.")
        return read_image(value, f"The image of row {row}", self._mode)

    def read(self, value: Any, row: int) -> Tensor:
        """uint8 `(C, H, W)` of a row; arguments and errors as `open`."""
        image = self.open(value, row)
        try:
            return to_uint8(image, self.channels, self.size, self.crop)
        except (ValueError, OSError) as error:
            raise UnreadableImage(f"The image of row {row}{place_of(value)} cannot be used: {error}.") from error


def raw_bytes(value: Any) -> bytes:
    """What identifies an undecoded image: its file's bytes; its path where they are not at hand."""
    if value is None:
        return b""
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        with open(value["path"], "rb") as file:
            return file.read()
    except OSError:
        return str(value["path"]).encode()


class ImagePixels(Dataset):
    """The images of a column as uint8 CHW tensors of one size.

    Args:
        data: Map-style data set.
        column: Of type `datasets.Image`.
        channels: 1 (grey) or 3 (RGB).
        size: (H, W); one number: square.
        cache: Decode all at once and keep them in memory.
        center_crop: As `to_uint8`.
        bad_images: What to do with one that cannot be read: `error`, or `skip`: the next readable row stands for it,
            whenever it is asked for, so that the order of a run stays a function of seed and place.

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
        self._reader = ImageReader(data.features[column], channels, self.size, center_crop)
        self._raw = undecoded(data.select_columns([column]), column)
        self._cached: Tensor | None = None
        self._sources: Tensor | None = None
        if cache:
            rows = [self.read(index) for index in range(len(data))]
            self._sources = torch.tensor([row for row, _ in rows])
            self._cached = torch.stack([pixels for _, pixels in rows])

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[int, Tensor]:
        """`(row, pixels)`: `row` is `index`, or the next readable row where `bad_images` skips.

        Raises:
            UnreadableImage: See the class.
            IndexError: For a row that is not there.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} of {len(self)} images.")
        if self._cached is not None and self._sources is not None:
            return int(self._sources[index]), self._cached[index]
        for row in range(index, index + min(MAX_BAD_IN_A_ROW, len(self))):
            row %= len(self)
            if row in self.bad:
                continue
            try:
                return row, self._reader.read(self.raw(row), row)
            except UnreadableImage as error:
                if self.bad_images == "error":
                    raise UnreadableImage(f"{error} Repair or drop it, or pass --bad_images skip.") from error
                self.bad[row] = str(error)
                _logger.warning("%s It is skipped (%d so far in this process).", error, len(self.bad))
        raise UnreadableImage(
            f"{min(MAX_BAD_IN_A_ROW, len(self))} images in a row cannot be read, from row {index} on; the first: "
            f"{self.bad[index]}"
        )

    def gather(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As `read` for several rows at once, `(B,)` int64 and `(B, C, H, W)`; from memory where they are cached."""
        if self._cached is not None and self._sources is not None:
            places = torch.tensor(list(indices))
            return self._sources[places], self._cached[places]
        read = [self.read(index) for index in indices]
        return torch.tensor([row for row, _ in read]), torch.stack([pixels for _, pixels in read])

    def paths(self) -> list[str | None]:
        """Of every row the file of its image; None where the data hold the image itself."""
        column = self._raw.with_format("arrow")[:].column(0)
        return [path for chunk in column.chunks for path in chunk.field("path").to_pylist()]

    def raw(self, row: int) -> dict[str, Any] | None:
        """Path and bytes of a row's image; None without one."""
        return self._raw[row][self.column]
