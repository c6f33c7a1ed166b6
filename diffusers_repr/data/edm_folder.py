"""Folders of preprocessed images as the tools of EDM, EDM2 and REPA write them: classes in a `dataset.json`.

Images lie in numbered shards, `00000/img00000000.png`, which are no classes; `dataset.json` has
`{"labels": [["00000/img00000000.png", 6], ...]}`, or null for images without classes. REPA keeps two such folders side
by side, `images` and `vae-sd`, the second with moments of latents in place of images.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import datasets
from PIL import Image

from diffusers_repr.hub import read_json
from diffusers_repr.hub.schema import MAX_ITEMS

LABELS = "dataset.json"
IMAGES = "images"
LATENTS = "vae-sd"
_SHARD = re.compile(r"\d{5}")
_NUMBERED = re.compile(r"img\d{8}\.\w+")


def open_edm_folder(path: Path, split: str) -> dict[str, datasets.Dataset] | None:
    """The images of such a folder with the classes of its `dataset.json`, in the order of their names.

    Args:
        path: The folder of the shards, or that of REPA around it.
        split: Wanted; a folder of this name in `path` is taken where it is such a folder, else `path` is `train`.

    Returns:
        Name of the split -> rows of `image` and, where there are classes, `label`; None for another kind of folder.

    Raises:
        ValueError: If `dataset.json` and the images, or its classes and the folders, do not fit together.
    """
    for name, place in ((split, path / split), ("train", path)):
        found = _find(place)
        if found is not None:
            return {name: _read(*found)}
    for file in sorted(path.glob(f"*/{LABELS}")):
        if file.parent.name != LATENTS and read_labels_file(file) is not NO_LABELS_FILE:
            raise ValueError(
                f"{str(path)!r} has no {LABELS} and no split {split!r} with one, and {file.parent.name!r} in it has "
                f"one, by which its images have their classes: pass {str(file.parent)!r}, or it as the split."
            )
    return None


class NoLabelsFile:
    """What `read_labels_file` gives for a file of another kind."""


NO_LABELS_FILE = NoLabelsFile()


def read_labels_file(file: Path) -> dict[str, int] | None | NoLabelsFile:
    """The classes of a `dataset.json`: name -> class; None for images without; `NO_LABELS_FILE` for another kind.

    Raises:
        ValueError: If it is damaged, names an image twice, or classes are no whole numbers from 0 to a million.
    """
    if not file.is_file():
        return NO_LABELS_FILE
    held = read_json(file)
    if not isinstance(held, dict) or "labels" not in held:
        return NO_LABELS_FILE
    pairs = held["labels"]
    if pairs is None:
        return None
    labels: dict[str, int] = {}
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        name, label = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if (
            not isinstance(name, str)
            or isinstance(label, bool)
            or not isinstance(label, int)
            or not 0 <= label < MAX_ITEMS
        ):
            raise ValueError(
                f"{str(file)!r} holds {str(pair)[:80]!r} among its labels; expected [file name, class], the class a "
                f"whole number from 0 to {MAX_ITEMS - 1}. Vectors as labels are not read."
            )
        if name in labels:
            raise ValueError(f"{str(file)!r} has the image {name[:80]!r} twice.")
        labels[name] = label
    return labels


def shard_and_number(name: str) -> tuple[str, str]:
    """Folder and number of an image or its latents: what their names have in common.

    Example:
        >>> shard_and_number("00000/img-mean-std-00000007.npy") == shard_and_number("00000/img00000007.png")
        True
    """
    folder, _, file = name.rpartition("/")
    return folder, re.sub(r".*?(\d*)$", r"\1", os.path.splitext(file)[0])


def files_below(folder: Path, endings: Sequence[str]) -> list[str]:
    """Files of a folder and those below it by their ending, as `a/b.png`, in the order of these names."""
    return sorted(
        os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(tuple(endings)) and not name.startswith(".")
    )


def _find(path: Path) -> tuple[Path, dict[str, int] | None, Path] | None:
    """Where the images lie, their classes, and the file these are from."""
    for folder in (path, path / IMAGES):
        labels = read_labels_file(folder / LABELS)
        if not isinstance(labels, NoLabelsFile):
            return folder, labels, folder / LABELS
    latents = read_labels_file(path / LATENTS / LABELS)
    if (path / IMAGES).is_dir() and not isinstance(latents, NoLabelsFile):
        folder = path / IMAGES
        if latents is None:
            return folder, None, path / LATENTS / LABELS
        by_number = {shard_and_number(name): label for name, label in latents.items()}
        names = {name: by_number.get(shard_and_number(name)) for name in _images(folder)}
        return folder, {k: v for k, v in names.items() if v is not None}, path / LATENTS / LABELS
    for folder in (path, path / IMAGES):
        if folder.is_dir() and _is_sharded(folder):
            return folder, None, folder / LABELS
    return None


def _is_sharded(folder: Path) -> bool:
    """Whether a folder without `dataset.json` holds numbered shards of numbered images, and nothing else."""
    inside = list(_first(folder, 32))
    if not inside or not all(part.is_dir() and _SHARD.fullmatch(part.name) for part in inside):
        return False
    names = [part.name for part in _first(inside[0], 32)]
    return bool(names) and all(_NUMBERED.fullmatch(name) for name in names)


def _first(folder: Path, count: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        for _, entry in zip(range(count), entries, strict=False):
            yield Path(entry.path)


def _images(folder: Path) -> list[str]:
    return files_below(folder, sorted(Image.registered_extensions()))


def _read(folder: Path, labels: dict[str, int] | None, file: Path) -> datasets.Dataset:
    names = _images(folder)
    if not names:
        latents = ", but latents: pass the folder around it, and this one as latents_dir" if _npy(folder) else ""
        raise ValueError(f"{str(folder)!r} has a {LABELS} and no images{latents}.")
    columns: dict[str, list[str] | list[int]] = {"image": [str(folder / name) for name in names]}
    if labels is None:
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    missing, gone = [name for name in names if name not in labels], sorted(labels.keys() - set(names))
    if missing or gone:
        findings = [f"it lacks {len(missing)} of {len(names)} images, the first is {missing[0]!r}"] if missing else []
        findings += [f"it names {len(gone)} that are not there, the first is {gone[0][:80]!r}"] if gone else []
        raise ValueError(
            f"{str(file)!r} does not fit the images of {str(folder)!r}: {'; '.join(findings)}. Run the preprocessing "
            f"anew, or take {LABELS} out of the folder where its subfolders are the classes."
        )
    ids = [labels[name] for name in names]
    columns["label"] = ids
    classes = datasets.ClassLabel(names=_class_names(names, labels, file))
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    return dataset.cast_column("label", classes)


def _class_names(names: Sequence[str], labels: Mapping[str, int], file: Path) -> list[str]:
    """The folders' names where folders are classes, and the numbers where they are shards.

    Raises:
        ValueError: If they are neither.
    """
    found = [str(number) for number in range(max(labels.values()) + 1)]
    tops = {name: name.split("/")[0] if "/" in name else "" for name in names}
    if all(not top or _SHARD.fullmatch(top) for top in tops.values()):
        return found
    pairs = sorted({(tops[name], labels[name]) for name in names})
    folders, ids = {top for top, _ in pairs}, {label for _, label in pairs}
    if len(pairs) != len(folders) or len(pairs) != len(ids):
        top, label = next(pair for pair in pairs if sum(pair[0] == t or pair[1] == i for t, i in pairs) > 1)
        raise ValueError(
            f"The classes in {str(file)!r} are not the folders of the images: one image in {top!r} has the class "
            f"{label}, and others of this folder or class do not agree. Take {LABELS} out of the folder if the "
            "folders are the classes; if it is right, put the images into numbered folders (00000, 00001, ...) and "
            "rename them in it."
        )
    for top, label in pairs:
        found[label] = top
    return found


def _npy(folder: Path) -> bool:
    return bool(files_below(folder, (".npy",)))
