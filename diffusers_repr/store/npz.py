"""`write_npz`: pictures as one array in a file that evaluators read, written as they come."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_npz(path: str | os.PathLike[str], pictures: Iterable[Image.Image], count: int) -> Path:
    """Write `arr_0`, uint8 `(N, H, W, 3)`, as the evaluator of ADM (guided-diffusion) reads it; grey is repeated.

    One picture is in memory at a time. The file takes its name when it is whole.

    Args:
        path: Of the file.
        pictures: Of one size.
        count: How many there are.

    Raises:
        ValueError: If sizes differ, or there are more or fewer pictures.
        OSError: If it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.tmp")
    first: tuple[int, ...] | None = None
    done = 0
    try:
        with (
            zipfile.ZipFile(half, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as file,
        ):
            for picture in pictures:
                array = np.asarray(picture.convert("RGB"), dtype=np.uint8)
                if first is None:
                    first = array.shape
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *first)}
                    np.lib.format.write_array_header_1_0(file, header)
                if array.shape != first:
                    raise ValueError(f"Picture {done} is {array.shape[:2]} (H, W), the others are {first[:2]}.")
                done += 1
                if done <= count:
                    file.write(array.tobytes())
        if done != count:
            raise ValueError(f"There are {done} pictures; {count} were announced.")
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    return path


__all__ = ["write_npz"]
