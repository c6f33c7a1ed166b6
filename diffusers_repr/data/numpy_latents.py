"""`NumpyLatents`: moments as REPA's preprocessing writes them, a file an image, read as a latent cache is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_repr.data.base import hashed, spread_rows
from diffusers_repr.data.edm_folder import LABELS, NoLabelsFile, files_below, read_labels_file, shard_and_number
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.denoiser.vae import encode_moments
from diffusers_repr.store.manifest import MANIFEST
from diffusers_repr.store.tensor_cache import LATENTS
from diffusers_repr.store.tensors import INDEX, TensorLayout

_APART = 0.1  # of the mean size of a latent: GPUs and half precision are nearer, another range of pixels is not


class NumpyLatents:
    """The folder `vae-sd` of REPA (arXiv 2410.06940): `00000/img-mean-std-00000000.npy`, `cat[mean, std]`, unscaled.

    A latent is `(mean + std * noise) * scaling_factor`, as in the paper's code. Files belong to the images of the same
    shard and number. EDM2's own latents, of pixels in [0, 1], are refused, as are those of another VAE: the first
    image is encoded and compared.

    Args:
        folder: Of the files, with their `dataset.json`.
        data: The images of the run, from the folder `images` beside it.
        vae: Of the run.
        flip: Whether the run mirrors images, whose latents are not there.

    Attributes:
        folder: As given.
        layout: Shape and fingerprint.

    Raises:
        ValueError: If images, labels, shapes or VAE do not fit, or the run flips.
    """

    def __init__(self, folder: str | os.PathLike[str], data: ImageTrainData, vae: Any, flip: bool) -> None:
        self.folder = Path(folder)
        if flip:
            raise ValueError(
                f"{str(folder)!r} holds no mirrored images, which random_flip needs (latents cannot be flipped). "
                "Train without random_flip, or make a cache with both by `diffusers-repr cache` in another folder."
            )
        self._files = self._paired(data)
        self._check_labels(data)
        row, pixels = data.images.read(0)
        with torch.no_grad():
            own = encode_moments(vae, to_unit(pixels[None]).to(next(vae.parameters()).device)).float().cpu()[0]
        self.layout = TensorLayout(len(self._files), 1, "", LATENTS, {"moments": (1, *own.shape)}, "float32")
        self._check_vae(row, own)
        rows = spread_rows(len(self))
        parts = [*(str(len(self)).encode(),), *((self.folder / self._files[row]).read_bytes() for row in rows)]
        self.layout = replace(self.layout, recipe=hashed(parts))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """`moments` `(1, 2 c, h, w)` of a row, and `index`, the row itself.

        Raises:
            ValueError: If the file cannot be read or holds something else; names it.
        """
        file, wanted = self.folder / self._files[row], self.layout.tensors["moments"]
        try:
            held = np.load(file, allow_pickle=False)
            values = torch.from_numpy(np.asarray(held, dtype=np.float32))
        except (OSError, ValueError, TypeError, EOFError, MemoryError) as error:
            raise ValueError(f"The latents {str(file)!r} cannot be read: {error}. Make them anew.") from error
        if tuple(values.shape) not in (wanted, wanted[1:]):
            raise ValueError(
                f"The latents {str(file)!r} are {tuple(values.shape)}; this VAE gives {wanted[1:]} (mean and standard "
                "deviation) of an image of this size."
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"The latents {str(file)!r} hold values that are not finite. Make them anew.")
        return {"moments": values.reshape(wanted), INDEX: torch.tensor(row)}

    def _paired(self, data: ImageTrainData) -> list[str]:
        """The file of each row of the data, by shard and number."""
        files = {shard_and_number(name): name for name in files_below(self.folder, (".npy",))}
        found = [None if path is None else files.get(_key(path)) for path in data.images.paths()]
        without = sum(name is None for name in found)
        if without or len(files) != len(found):
            raise ValueError(
                f"{str(self.folder)!r} has latents of {len(files)} images, and {without} of the {len(found)} images "
                "of the run have none by shard and number. Pass the folder around both, with `images` in it, as "
                "dataset_name."
            )
        return [name for name in found if name is not None]

    def _check_labels(self, data: ImageTrainData) -> None:
        labels = read_labels_file(self.folder / LABELS)
        if labels is None or isinstance(labels, NoLabelsFile) or data.labels is None:
            return
        for row, (name, label) in enumerate(zip(self._files, data.labels.tolist(), strict=True)):
            if labels.get(name) != label:
                raise ValueError(
                    f"{str(self.folder / LABELS)!r} gives {name!r} the class {labels.get(name)}, and its image, row "
                    f"{row}, has {label}. The two were not made of the same images: run the preprocessing anew."
                )

    def _check_vae(self, row: int, own: Tensor) -> None:
        mean, wanted = self[row]["moments"][0].chunk(2)[0], own.chunk(2)[0]
        away, size = float((mean - wanted).abs().mean()), float(wanted.abs().mean())
        if not away <= _APART * size:
            raise ValueError(
                f"The latents of row {row} in {str(self.folder)!r} are not what the run's VAE gives of its image: off "
                f"by {away:.3g}, where a latent has {size:.3g}. Another VAE made them, or of another crop or range of "
                "pixels (EDM2's own code takes [0, 1]). Make them with this VAE: `diffusers-repr cache`."
            )


def is_numpy_latents(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds latents of REPA's preprocessing, and no cache of ours."""
    place = Path(folder)
    return not (place / MANIFEST).exists() and not isinstance(read_labels_file(place / LABELS), NoLabelsFile)


def _key(path: str) -> tuple[str, str]:
    return shard_and_number("/".join(Path(path).parts[-2:]))
