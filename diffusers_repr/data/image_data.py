"""Labelled images from a folder, Parquet files or the Hub, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from diffusers_repr.data.edm_folder import open_edm_folder
from diffusers_repr.data.image_files import UnreadableImage, read_image, undecoded


@dataclass(frozen=True)
class ImageData:
    """One split of a data set of images.

    Attributes:
        dataset: Rows, in a fixed order.
        image_column: Column of images.
        label_column: Column of class ids; None without labels.
        label_names: Name of each class id.
        name: Path or Hub id.
        split: Name of the split.
    """

    dataset: datasets.Dataset
    image_column: str
    label_column: str | None
    label_names: list[str] | None
    name: str
    split: str

    def __len__(self) -> int:
        return len(self.dataset)

    def labels(self) -> list[int]:
        """Class id of every row.

        Raises:
            ValueError: If there is no label column.
        """
        if self.label_column is None:
            raise ValueError(
                f"{self.name} has no label column; columns are {self.dataset.column_names}. Name one by label_column "
                "if it is not called 'label'; in a folder of images, put each class into a subfolder."
            )
        return self._whole(self.dataset[self.label_column])

    def select(self, rows: Sequence[int]) -> ImageData:
        """The data with these rows, in this order."""
        return ImageData(
            self.dataset.select(rows), self.image_column, self.label_column, self.label_names, self.name, self.split
        )

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
            return [self._checked(self.dataset[row][self.image_column], row) for row in rows]
        mode = self.dataset.features[self.image_column].mode
        found = zip(self._raw[list(rows)][self.image_column], rows, strict=True)
        return [read_image(self._checked(value, row), self._row(row), mode) for value, row in found]

    @cached_property
    def _raw(self) -> datasets.Dataset:
        return undecoded(self.dataset.select_columns([self.image_column]), self.image_column)

    @cached_property
    def _classes(self) -> datasets.Dataset:
        return self.dataset.with_format(None).select_columns([self.label_column])

    @property
    def _transformed(self) -> bool:
        return self.dataset.format["type"] == "custom"

    def _checked(self, value: Any, row: int) -> Any:
        if value is None:
            raise UnreadableImage(f"{self._row(row)} has no image.")
        return value

    def _row(self, row: int) -> str:
        return f"Row {row} of {self.name} (split {self.split!r})"

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
) -> ImageData:
    """Open a split of images.

    Args:
        path: Folder (of images, one subfolder a class, or with classes in a `dataset.json` as EDM and REPA write them;
            of Parquet files; or of `save_to_disk`), a Parquet file, or a Hub id.
        split: Name of the split.
        image_column: The column of type `datasets.Image` if None.
        label_column: The column of type `ClassLabel`, or an integer column named `label`, if None.
        revision: Of a Hub id.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a column or the split is not there, a column holds something else, or there are no rows.
    """
    dataset = open_split(path, split, revision)
    return from_dataset(dataset, image_column, label_column, path, split)


def from_dataset(
    dataset: datasets.Dataset,
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
    split: str = "train",
) -> ImageData:
    """As `load_images`, from a `datasets.Dataset`."""
    image_column, label_column = choose_columns(dataset.features, image_column, label_column, name)
    if not len(dataset):
        raise ValueError(f"{name} (split {split!r}) has no rows.")
    names = getattr(dataset.features[label_column], "names", None) if label_column else None
    dataset = dataset.select_columns([image_column, *([label_column] if label_column else [])])
    return ImageData(dataset, image_column, label_column, names, name, split)


def choose_columns(
    features: Mapping[str, Any],
    image_column: str | None = None,
    label_column: str | None = None,
    name: str = "dataset",
) -> tuple[str, str | None]:
    """Columns of images and of class ids (None: there are no labels); see `load_images` for the choice.

    Args:
        features: Type of each column, as `datasets` has them.
        image_column: As in `load_images`.
        label_column: As in `load_images`.
        name: Of the data set, for messages.

    Raises:
        ValueError: If a column is not there or holds something else.
    """
    images = [k for k, v in features.items() if isinstance(v, datasets.Image)]
    if not images:
        raise ValueError(
            f"{name} has no column of images; its columns are {list(features)}. A column of files or of their bytes "
            "becomes one by `dataset.cast_column(column, datasets.Image())`."
        )
    if image_column is None and len(images) > 1:
        raise ValueError(f"{name} has several columns of images: {images}. Choose one by image_column.")
    image_column = image_column or images[0]
    if image_column not in features:
        raise ValueError(f"{name} has no column {image_column!r}; columns are {list(features)}, images are {images}.")
    if image_column not in images:
        raise ValueError(
            f"Column {image_column!r} of {name} holds {features[image_column]}, not images; images: {images}."
        )
    if label_column is not None and label_column not in features:
        raise ValueError(f"{name} has no column {label_column!r}; columns are {list(features)}.")
    if label_column is None:
        classes = [k for k, v in features.items() if isinstance(v, datasets.ClassLabel)]
        plain = [k for k in ("label",) if k in features and str(getattr(features[k], "dtype", "")).startswith("int")]
        found = classes or plain
        label_column = found[0] if found else None
    if label_column is not None and not _is_label(features[label_column]):
        raise ValueError(
            f"Column {label_column!r} of {name} holds {features[label_column]}, not class ids. Use whole numbers or a "
            f"ClassLabel (`dataset.class_encode_column({label_column!r})` makes one)."
        )
    return image_column, label_column


def _is_label(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or str(getattr(feature, "dtype", "")).startswith(("int", "uint"))


def open_split(path: str, split: str, revision: str | None = None, streaming: bool = False) -> Any:
    """A split of a folder, Parquet file or Hub id with all its columns.

    Args:
        path: As in `load_images`.
        split: Name of the split.
        revision: Of a Hub id.
        streaming: Give a `datasets.IterableDataset`, read as it is used, instead of a `datasets.Dataset`.

    Raises:
        FileNotFoundError: If the path does not exist or the id cannot be reached.
        ValueError: If the split is not there, or a revision is given with a local path.
    """
    local = Path(path)
    if local.exists() and revision is not None:
        raise ValueError(f"revision={revision!r} was given with the local path {path!r}, which has no revisions.")
    if not local.exists() and (local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        raise FileNotFoundError(f"No file or folder {path!r}. Pass a folder, a .parquet file or a Hub id 'user/name'.")
    try:
        found = _load(local, path, split, revision, streaming)
    except (datasets.exceptions.DatasetsError, FileNotFoundError, ConnectionError, pyarrow.ArrowException) as error:
        raise FileNotFoundError(
            f"Could not open {path!r} as a data set: {error}. Pass a folder with images (one subfolder a class) or "
            "Parquet files, a .parquet file, or a Hub id that can be reached."
        ) from error
    if not isinstance(found, dict):  # `Dataset.save_to_disk`: one split, without a name
        return found
    if split not in found:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(map(str, found))}.")
    return found[split]


def _load(local: Path, path: str, split: str, revision: str | None, streaming: bool) -> Any:
    if local.is_file():
        if local.suffix != ".parquet":
            raise ValueError(
                f"{path} is a {local.suffix or 'plain'} file; pass a .parquet file, a folder or a Hub id."
            )
        return datasets.load_dataset("parquet", data_files={split: str(local)}, streaming=streaming)
    if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
        if streaming:
            raise ValueError(
                f"{path} was written by `save_to_disk`, which is memory-mapped already; leave streaming out."
            )
        return datasets.load_from_disk(path)
    preprocessed = open_edm_folder(local, split) if local.is_dir() else None
    if preprocessed is not None:
        return {name: rows.to_iterable_dataset() if streaming else rows for name, rows in preprocessed.items()}
    return datasets.load_dataset(path, revision=revision, streaming=streaming)
