"""Reading the feature cache: what `encoders.feature_cache.cache_features` wrote of a run's teachers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.latents import image_fingerprint
from diffusers_repr.store.manifest import MANIFEST
from diffusers_repr.store.tensor_cache import FEATURES, TensorCache

_NAMES = ("name", "revision")  # of an encoder's fingerprint: where it came from, not what it computes


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
    cache = TensorCache.open(place, FEATURES)
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
            f"No feature cache in {str(folder)!r}. `diffusers-repr cache --cache_features` makes one."
        )
    caches: Iterable[TensorCache] = [TensorCache.open(path.parent, FEATURES) for path in found]
    return {cache.manifest["about"]["name"]: cache for cache in caches}


def encoder_fingerprint(encoder: Any) -> dict[str, Any]:
    """What decides an encoder's features, as JSON; not where it came from."""
    return {key: value for key, value in encoder.fingerprint().items() if key not in _NAMES}


def encoder_folder(folder: str | os.PathLike[str], name: str) -> Path:
    """Where the features of an encoder lie, its name without what a path could not hold."""
    return Path(folder) / re.sub(r"[^\w.@=-]+", "_", name)
