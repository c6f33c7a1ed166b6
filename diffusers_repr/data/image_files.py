"""One reader of image files for training, features, probes and commands: every failure names the image."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusers_repr.denoiser.images import as_mode, check_mode
from diffusers_repr.hub.schema import printable

MAX_PIXELS_VARIABLE = "DIFFUSERS_REPR_MAX_IMAGE_PIXELS"


class UnreadableImage(ValueError):
    """An image that cannot be read; the message names it and says why."""


def read_image(value: Any, what: str, mode: str | None = None) -> Image.Image:
    """The decoded image, turned as its EXIF data says; of several frames the first.

    PIL opens images of at most twice `PIL.Image.MAX_IMAGE_PIXELS` (about 179 million) pixels; the environment variable
    `DIFFUSERS_REPR_MAX_IMAGE_PIXELS` sets that number.

    Args:
        value: A path; or path and bytes, as `datasets.Image(decode=False)` gives them, or an image.
        what: Names it in the message: `The image of row 3`.
        mode: Of the `datasets.Image` of the column: `L` and `RGB` as `as_mode` makes them.

    Raises:
        UnreadableImage: If it is none, is damaged or too large, or has a mode that `as_mode` refuses.
    """
    image = read_decoded(value, what)
    try:
        check_mode(image)
        if mode in ("L", "RGB"):
            return as_mode(image, 1 if mode == "L" else 3)
        return image if mode in (None, image.mode) else image.convert(mode)
    except (ValueError, OSError) as error:
        raise UnreadableImage(f"{what}{place_of(value)} cannot be used: {error}.") from error


def read_decoded(value: Any, what: str) -> Image.Image:
    """As `read_image`, of whatever mode the file is: a mask's values are no colours."""
    what += place_of(value)
    _set_bound()
    if isinstance(value, Image.Image):  # datasets 4 takes it for a file
        return value
    try:
        return _opened(value) if isinstance(value, Path) else datasets.Image().decode_example(value)
    except (ConnectionError, TimeoutError, MemoryError):  # says nothing of the image
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(
            f"{what} cannot be read: {error} The bound is twice PIL.Image.MAX_IMAGE_PIXELS; set {MAX_PIXELS_VARIABLE} "
            "to raise it for images that you trust."
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{what} cannot be read: it is no image of a format that PIL knows, or empty."
        ) from error
    except Exception as error:  # PIL tells broken files by many kinds
        raise UnreadableImage(f"{what} cannot be read: {error or type(error).__name__}.") from error


def undecoded(data: Any, column: str) -> Any:
    """The data set (map-style or stream) with that column as path and bytes."""
    return data.with_format(None).cast_column(column, datasets.Image(decode=False))


def raw_bytes(value: Any) -> bytes:
    """What identifies what is stored in a row.

    Of an undecoded image its file's bytes, or its path where they are not at hand; of lists the numbers.
    """
    if value is None:
        return b""
    if not isinstance(value, Mapping):
        return json.dumps(value).encode()
    if value["bytes"] is not None:
        return value["bytes"]
    try:
        with open(value["path"], "rb") as file:
            return file.read()
    except OSError:
        return str(value["path"]).encode()


def place_of(value: Any) -> str:
    """Where an undecoded image lies, in brackets; empty where that is not known."""
    path = value.get("path") if isinstance(value, Mapping) else value if isinstance(value, Path) else None
    return f" ({printable(str(path))[:500]})" if path else ""


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return ImageOps.exif_transpose(image).copy()


def _set_bound() -> None:
    limit = os.environ.get(MAX_PIXELS_VARIABLE)
    if limit is None:
        return
    if not limit.isdecimal() or not 0 < int(limit) < 10**12:
        raise ValueError(f"{MAX_PIXELS_VARIABLE}={limit!r}; it is a whole number of pixels from 1.")
    if int(limit) != Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = int(limit)
