"""The feature cache: a teacher's tokens and global features for every image, and for its mirror."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.cache_writer import CacheSettings, process_state, write_cache
from diffusers_repr.data.latents import image_fingerprint
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.store.tensor_cache import MANIFEST, TensorCache

KIND = "features"
_NAMES = ("name", "revision")  # of an encoder's fingerprint: where it came from, not what it computes


def cache_features(
    encoder: Any, data: ImageTrainData, out: str | os.PathLike[str], settings: CacheSettings | None = None
) -> TensorCache:
    """Write a teacher's `tokens` (N, D) and, where it has them, `global` features (D,) of every image.

    Training then reads them instead of running the teacher; they are exact only where images are at most mirrored.
    Each encoder has a folder of its own in `out`, so that another can be added later.

    Args:
        encoder: An `Encoder`; it is moved to the process's device.
        data: The images as training crops them, before any augmentation.
        out: Folder of all feature caches of the data.
        settings: Mirrors, dtype (float16 is enough for features, and the default here), batch size and more.

    Raises:
        FileExistsError, ValueError, OSError: As `cache_latents`.
    """
    settings = settings or CacheSettings(both_mirrors=data.config.random_flip, dtype="float16")
    encoder.to(settings.device or process_state().device)

    def features(pixels: Tensor) -> dict[str, Tensor]:
        output = encoder.encode_pixels(pixels)
        found = {"tokens": output.tokens, "global": output.global_features}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    recipe = {"encoder": encoder_fingerprint(encoder), "data": image_fingerprint(data)}
    grid = list(encoder.grid_for(data.images.size))
    about = {"name": encoder.name, "fingerprint": encoder.fingerprint(), "grid": grid}
    return write_cache(encoder_folder(out, encoder.name), KIND, data, features, recipe, settings, about)


def open_features(folder: str | os.PathLike[str], data: TrainData, encoder: Any, flip: bool) -> TensorCache | None:
    """The feature cache of a run's encoder; None if `folder` has none of this name.

    Args:
        folder: Of all feature caches of the data.
        data: The images of the run.
        encoder: Of the run, or what stands for it: `name` and `fingerprint()` are used.
        flip: Whether the run mirrors images.

    Raises:
        ValueError: If it is not finished, or was made with another encoder, crop, size or data, or without mirrors.
    """
    place = encoder_folder(folder, encoder.name)
    if not (place / MANIFEST).is_file():
        return None
    cache = TensorCache.open(place, KIND)
    cache.check({"data": image_fingerprint(data), "encoder": encoder_fingerprint(encoder)}, 2 if flip else 1)
    return cache


def list_features(folder: str | os.PathLike[str]) -> dict[str, TensorCache]:
    """The finished feature caches in a folder, by the name of their encoder.

    The manifest's `about` tells `grid` and `fingerprint`, so that a run can do without the encoder itself.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If one is not finished.
    """
    found = sorted(Path(folder).glob(f"*/{MANIFEST}"))
    if not found:
        raise FileNotFoundError(
            f"No feature cache in {str(folder)!r}. `examples/cache_latents.py --cache_features` makes one."
        )
    caches: Iterable[TensorCache] = [TensorCache.open(path.parent, KIND) for path in found]
    return {cache.manifest["about"]["name"]: cache for cache in caches}


def encoder_fingerprint(encoder: Any) -> dict[str, Any]:
    """What decides an encoder's features, as JSON; not where it came from."""
    return {key: value for key, value in encoder.fingerprint().items() if key not in _NAMES}


def encoder_folder(folder: str | os.PathLike[str], name: str) -> Path:
    """Where the features of an encoder lie, its name without what a path could not hold."""
    return Path(folder) / re.sub(r"[^\w.@=-]+", "_", name)
