"""Writing the feature cache: a teacher's tokens and global features for every image, and for its mirror."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from diffusers_repr.data.cache_writer import CacheSettings, write_cache
from diffusers_repr.data.latents import image_fingerprint
from diffusers_repr.data.teacher_features import encoder_fingerprint, encoder_folder
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.store.processes import process_state
from diffusers_repr.store.tensor_cache import FEATURES, TensorCache


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
    return write_cache(encoder_folder(out, encoder.name), FEATURES, data, features, recipe, settings, about)
