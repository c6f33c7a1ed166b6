"""HPatches' image sequences (Balntas et al. 2017): six images of a plane each, with the homographies between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.data.image_files import read_image

HPATCHES_URL = "https://github.com/hpatches/hpatches-dataset"
_HOW = (
    f"Get hpatches-sequences-release.tar.gz by way of {HPATCHES_URL} and unpack it; pass the folder that holds "
    "i_ajuntament and the others."
)
# Of 116 sequences these are large; the numbers of D2-Net, and of DIFT after it, are of the other 108.
LARGE_SEQUENCES = (
    "i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding", "v_artisans", "v_astronautis", "v_talent",
)  # fmt: skip
_COUNT = 6


@dataclass(frozen=True, eq=False)
class PlaneSequence:
    """One sequence.

    Attributes:
        name: Begins with `i_` (light changes) or `v_` (the viewpoint does).
        files: Of the six images; the first is the reference.
        homographies: `(5, 3, 3)` float64: of the first image to each other, on points (x, y, 1).
        points: Key points of each image, `(N, 2)` as (x, y); None: none were given.
    """

    name: str
    files: tuple[Path, ...]
    homographies: Tensor
    points: tuple[Tensor, ...] | None = None

    def image(self, at: int) -> Image.Image:
        """An image, counted from 0."""
        return read_image(self.files[at], f"Image {at + 1} of {self.name}")


def load_hpatches(
    folder: str | Path,
    key_points: str | Path | None = None,
    *,
    leave_out: Sequence[str] = LARGE_SEQUENCES,
    limit: int | None = None,
) -> list[PlaneSequence]:
    """Sequences of a local copy, by name.

    Args:
        folder: That holds a folder a sequence: `1.ppm` to `6.ppm` and `H_1_2` to `H_1_6`.
        key_points: Folder with `<sequence>-<image>.kp`, lines of `x y`, such as the SuperPoint ones that DIFT uses;
            points that stand there twice are taken once.
        leave_out: Names; by default the eight that D2-Net's and DIFT's numbers leave out.
        limit: The first sequences, for a quick try.

    Raises:
        FileNotFoundError: If it is not there; says how to get it.
        ValueError: For files that are no homographies or points.
    """
    root = Path(folder).expanduser()
    names = sorted(p.name for p in root.glob("[iv]_*") if p.is_dir()) if root.is_dir() else []
    if not names:
        raise FileNotFoundError(f"No HPatches sequences (i_*, v_*) in {str(root)!r}. {_HOW}")
    names = [name for name in names if name not in leave_out][:limit]
    if not names:
        raise ValueError(f"All sequences of {str(root)!r} are left out.")
    return [_sequence(root / name, None if key_points is None else Path(key_points).expanduser()) for name in names]


def _sequence(place: Path, key_points: Path | None) -> PlaneSequence:
    files = tuple(place / f"{number}.ppm" for number in range(1, _COUNT + 1))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{str(file)!r} is missing. {_HOW}")
    matrices = [_numbers(place / f"H_1_{number}", (3, 3)) for number in range(2, _COUNT + 1)]
    points = None
    if key_points is not None:
        points = tuple(
            torch.from_numpy(np.unique(_numbers(key_points / f"{place.name}-{number}.kp", (-1, 2)), axis=0))
            for number in range(1, _COUNT + 1)
        )
    return PlaneSequence(place.name, files, torch.from_numpy(np.stack(matrices)), points)


def _numbers(file: Path, shape: tuple[int, int]) -> np.ndarray:
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is missing. {_HOW}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a file without a line
            found = np.loadtxt(file, dtype=np.float64, ndmin=2)
        if shape[0] < 0 and (found.shape[1] < shape[1] or not len(found)):
            raise ValueError(f"the file has {len(found)} lines of {found.shape[1]} numbers")
        found = found[:, : shape[1]] if shape[0] < 0 else found.reshape(shape)
    except ValueError as error:
        raise ValueError(f"{str(file)!r} holds no numbers of shape {shape}: {error}") from error
    if not np.isfinite(found).all():
        raise ValueError(f"{str(file)!r} holds NaN or infinite numbers.")
    return found


__all__ = ["HPATCHES_URL", "LARGE_SEQUENCES", "PlaneSequence", "load_hpatches"]
