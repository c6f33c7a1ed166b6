"""A split of a folder, a Parquet file or a Hub id, through `datasets`; of generated images; or of the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow

from diffusers_repr.data.digits import DIGITS, SPLIT_SIZES, load_digits_splits
from diffusers_repr.data.edm_folder import open_edm_folder
from diffusers_repr.store.image_store import ImageStore, is_image_store


def open_split(path: str, split: str, revision: str | None = None, streaming: bool = False) -> Any:
    """A split of a folder, Parquet file or Hub id, or of `digits`, with all its columns.

    Args:
        path: As in `load_images`.
        split: Name of the split.
        revision: Of a Hub id.
        streaming: Give a `datasets.IterableDataset`, read as it is used, instead of a `datasets.Dataset`.

    Raises:
        FileNotFoundError: If the path does not exist or the id cannot be reached.
        ValueError: If the split is not there, a revision is given with a local path or the digits, or `digits` may
            mean a folder, too.
    """
    local = Path(path)
    if path == DIGITS:
        return _digits(split, revision, streaming)
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


def has_split(path: str, split: str, revision: str | None = None) -> bool:
    """Whether a data set has a split of this name; one Parquet file, or one split of `save_to_disk`, has no names.

    Args:
        path: As in `load_images`.
        split: Its name.
        revision: Of a Hub id.

    Raises:
        FileNotFoundError: If the path does not exist or the id cannot be reached.
    """
    local = Path(path)
    if path == DIGITS:
        return split in SPLIT_SIZES
    if local.is_file() or (local / "state.json").is_file():
        return False
    if (local / "dataset_dict.json").is_file():
        return split in datasets.load_from_disk(path)
    preprocessed = open_edm_folder(local, split) if local.is_dir() else None
    if preprocessed is not None:
        return split in preprocessed
    try:
        return split in datasets.get_dataset_split_names(path, revision=revision)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise FileNotFoundError(f"Could not open {path!r} as a data set: {error}.") from error


def _digits(split: str, revision: str | None, streaming: bool) -> Any:
    if Path(DIGITS).exists():
        raise ValueError(
            f"{DIGITS!r} is the data set of scikit-learn, and a folder here; './{DIGITS}' means the folder."
        )
    if revision is not None:
        raise ValueError(f"revision={revision!r} was given with {DIGITS!r}, which has no revisions.")
    if split not in SPLIT_SIZES:
        raise ValueError(f"{DIGITS!r} has no split {split!r}, only {list(SPLIT_SIZES)}.")
    found = load_digits_splits()[split]
    return found.to_iterable_dataset() if streaming else found


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
    if is_image_store(local):
        made = ImageStore.open(local).labelled()
        return {made.split or "train": made.to_iterable_dataset() if streaming else made}
    preprocessed = open_edm_folder(local, split) if local.is_dir() else None
    if preprocessed is not None:
        return {name: rows.to_iterable_dataset() if streaming else rows for name, rows in preprocessed.items()}
    return datasets.load_dataset(path, revision=revision, streaming=streaming)
