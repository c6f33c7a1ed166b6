"""`encode_rows`: one vector of every image of a run, from the cache of features or by the encoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.teacher_features import open_features
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.encoders.encoder import Encoder


def encode_rows(
    encoder: Encoder,
    data: Any,
    which: str = "global",
    features_dir: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """Vectors `(N, D)`, float32 on the CPU, in the order of the rows; nothing of an augmentation.

    Args:
        encoder: What makes them, or made the cache.
        data: Images of a run, as `load_train_data` gives them.
        which: `global`, or the mean of the `tokens`.
        features_dir: Folder of feature caches, as `diffusers-repr cache` writes it; the images are encoded if None.
        batch_size: Images of one forward.

    Raises:
        FileNotFoundError: If the folder has no cache of this encoder.
        ValueError: If the cache is of another encoder, other data or lacks global features.
    """
    if features_dir is None:
        return _encoded(encoder, data, which, batch_size)
    cache = open_features(features_dir, data, encoder, False)
    if cache is None:
        raise FileNotFoundError(
            f"{str(features_dir)!r} holds no features of {encoder.name!r}. Make them by `diffusers-repr cache "
            "--cache_features`, or leave features_dir out."
        )
    rows = [cache[row] for row in range(len(data))]
    if which == "global" and "global" not in rows[0]:
        raise ValueError(f"The cache of {encoder.name!r} has no global features; take 'tokens', whose mean is taken.")
    name = "global" if which == "global" else "tokens"
    found = torch.stack([row[name][0].float() for row in rows])
    return found if which == "global" else found.mean(1)


def _encoded(encoder: Encoder, data: Any, which: str, batch_size: int) -> Tensor:
    parts = []
    for start in range(0, len(data), batch_size):
        rows: Sequence[int] = range(start, min(start + batch_size, len(data)))
        pixels = torch.stack([torch.as_tensor(data[row]["pixel_values"]) for row in rows])
        output = encoder.encode_pixels(to_unit(pixels.to(encoder.device)))
        parts.append((output.global_features if which == "global" else output.tokens.mean(1)).float().cpu())
    return torch.cat(parts)


__all__ = ["encode_rows"]
