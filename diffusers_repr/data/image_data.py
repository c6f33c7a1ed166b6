"""Images with what is known of them, from a folder, Parquet files or the Hub, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets

from diffusers_repr.data.columns import Columns, choose_columns
from diffusers_repr.data.image_files import UnreadableImage
from diffusers_repr.data.masks import IGNORE_INDEX, MaskColumn
from diffusers_repr.data.palette import Palette
from diffusers_repr.data.samples import Sample, SampleReader
from diffusers_repr.data.splits import open_split


@dataclass(frozen=True, repr=False)
class ImageData:
    """One split of a data set of images.

    Attributes:
        dataset: Rows, in a fixed order.
        columns: Which of its columns hold what.
        label_names: Name of each class id.
        name: Path or Hub id.
        split: Name of the split.
        masks: Of the column of masks: names of the classes of pixels, and the id of those of none; None without masks.
    """

    dataset: datasets.Dataset
    columns: Columns
    label_names: list[str] | None
    name: str
    split: str
    masks: MaskColumn | None = None

    @property
    def image_column(self) -> str:
        """Column of images."""
        return self.columns.image

    @property
    def label_column(self) -> str | None:
        """Column of class ids; None without labels."""
        return self.columns.label

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        few = ", ".join(map(repr, (self.label_names or [])[:3])) + (", ..." if len(self.label_names or []) > 3 else "")
        classes = f"{len(self.label_names)} classes ({few})" if self.label_names else "no names of classes"
        columns = {name: column for name, column in vars(self.columns).items() if column and name != "unlabelled"}
        read = ", ".join(f"{name}={column!r}" for name, column in columns.items())
        return f"ImageData({self.name!r}, split {self.split!r}: {len(self)} images, {classes},\n    columns: {read})"

    def labels(self) -> list[int]:
        """Class id of every row.

        Raises:
            ValueError: If there is no label column, or a row has no label.
        """
        if self.label_column is None:
            raise ValueError(self.columns.unlabelled)
        return self._whole(self.dataset[self.label_column])

    def select(self, rows: Sequence[int]) -> ImageData:
        """The data with these rows, in this order."""
        return replace(self, dataset=self.dataset.select(rows))

    def batches(
        self, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[list[Any], list[int] | None]]:
        """`(images, labels)` of rows `start..stop`, `size` at a time."""
        stop = len(self) if stop is None else min(stop, len(self))
        for at in range(start, stop, size):
            rows = range(at, min(at + size, stop))
            labels = None
            if self.label_column is not None:
                labels = self._whole(self._classes[at : rows.stop][self.label_column], at)
            yield self.read(rows), labels

    def read(self, rows: Sequence[int]) -> list[Any]:
        """The images of these rows.

        Raises:
            UnreadableImage: A ValueError that names the row, and the file where that is known.
        """
        if self._transformed:  # what the user's function makes is the image
            return [self._made(row) for row in rows]
        found = zip(self._images[list(rows)][self.image_column], rows, strict=True)
        return [self._reader.image(value, row) for value, row in found]

    def samples(self, rows: Sequence[int]) -> list[Sample]:
        """The images of these rows with their masks and points, each at the size it was stored in.

        `Placement.of(size, image_size, "stretch")` takes masks and points where `to_pixels` takes the images.

        Raises:
            UnreadableImage: As `read`; for masks, too.
            ValueError: If a mask or points do not fit their image.
        """
        if self._transformed:
            raise ValueError(
                f"{self.name} has a transform (`set_transform`), which masks and points would not follow; read the "
                "data without it."
            )
        return [self._reader.read(self._raw[row], row) for row in rows]

    def captions(self, rows: Sequence[int]) -> list[str]:
        """The texts of these rows, empty where there is none.

        Raises:
            ValueError: If no column of texts was chosen.
        """
        if self.columns.caption is None:
            raise ValueError(f"{self.name} was opened without texts; columns are named by caption_column.")
        return [text or "" for text in self.dataset.with_format(None)[list(rows)][self.columns.caption]]

    @cached_property
    def _reader(self) -> SampleReader:
        return SampleReader(self.dataset.features, self.columns, self.masks, f"{self.name} (split {self.split!r})")

    @cached_property
    def _raw(self) -> datasets.Dataset:
        return self._reader.undecoded(self.dataset.with_format(None))

    @cached_property
    def _images(self) -> datasets.Dataset:
        return self._raw.select_columns([self.image_column])

    @cached_property
    def _classes(self) -> datasets.Dataset:
        return self.dataset.with_format(None).select_columns([self.label_column])

    @property
    def _transformed(self) -> bool:
        return self.dataset.format["type"] == "custom"

    def _made(self, row: int) -> Any:
        made = self.dataset[row][self.image_column]
        if made is None:
            raise UnreadableImage(f"Row {row} of {self.name} (split {self.split!r}) has no image.")
        return made

    def _whole(self, values: Iterable[Any], start: int = 0) -> list[int]:
        labels = list(values)
        if None in labels:
            raise ValueError(
                f"Row {start + labels.index(None)} of {self.name} (split {self.split!r}) has no label in "
                f"{self.label_column!r}."
            )
        return [int(v) for v in labels]


def load_images(
    path: str,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    revision: str | None = None,
    **annotations: Any,
) -> ImageData:
    """Open a split of images.

    Args:
        path: Folder (of images, one subfolder a class, or with classes in a `dataset.json` as EDM and REPA write them;
            of Parquet files; or of `save_to_disk`), a Parquet file, a Hub id, or `digits`: those of scikit-learn.
        split: Name of the split.
        image_column: The column of type `datasets.Image`, that of masks apart, if None.
        label_column: The column of type `ClassLabel`, or an integer column named `label`, if None.
        revision: Of a Hub id.
        annotations: `caption_column`, `mask_column`, `points_column`, `mask_names`, `ignore_index`, `palette`,
            as `from_dataset` takes them.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a column or the split is not there, a column holds something else, or there are no rows.
    """
    return from_dataset(open_split(path, split, revision), image_column, label_column, path, split, **annotations)


def from_dataset(
    dataset: datasets.Dataset,
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
    split: str = "train",
    *,
    caption_column: str | None = None,
    mask_column: str | None = None,
    points_column: str | None = None,
    mask_names: Sequence[str] | None = None,
    ignore_index: int | None = IGNORE_INDEX,
    palette: Palette | None = None,
) -> ImageData:
    """As `load_images`, from a `datasets.Dataset`.

    Args:
        dataset: The split.
        image_column: As in `load_images`.
        label_column: As in `load_images`.
        name: Of the data set, for messages and records.
        split: Likewise.
        caption_column: Texts; none if None.
        mask_column: Class ids of pixels, as images or arrays `(H, W)`; none if None.
        points_column: Lists of `[x, y]` or `[x, y, visible]` in pixels; none if None.
        mask_names: Name of each class of pixels; what the column knows if None.
        ignore_index: Id of pixels of no class.
        palette: Of masks that are images of colours.
    """
    columns = choose_columns(
        dataset.features, image_column, label_column, caption_column, mask_column, points_column, name=name
    )
    if not len(dataset):
        raise ValueError(f"{name} (split {split!r}) has no rows.")
    if mask_names is not None and mask_column is None:
        raise ValueError("mask_names is given, but no mask_column; name the column.")
    names = getattr(dataset.features[columns.label], "names", None) if columns.label else None
    masks = (
        None if mask_column is None else MaskColumn(dataset.features[mask_column], mask_names, ignore_index, palette)
    )
    return ImageData(dataset.select_columns(columns.used()), columns, names, name, split, masks)
