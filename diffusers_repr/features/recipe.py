"""What a feature store holds, said completely: two stores with one recipe hold the same features."""

from __future__ import annotations

import os
from typing import Any

from diffusers_repr.data.image_data import ImageData
from diffusers_repr.denoiser.record import base_record
from diffusers_repr.features.extractor import FeatureExtractor
from diffusers_repr.noise import NoiseSchedule


def extraction_recipe(
    extractor: FeatureExtractor,
    data: ImageData,
    *,
    rows: int,
    image_size: tuple[int, int],
    dtype: str,
    prompt: str | None = None,
    class_label: int | None = None,
) -> dict[str, Any]:
    """Everything the features depend on, as plain JSON values.

    Args:
        extractor: Its settings and its denoiser.
        data: The images.
        rows: How many of them, from the first.
        image_size: (H, W) in pixels, as the network sees them.
        dtype: Of the stored features.
        prompt: As given; may hold `{label}`.
        class_label: One for all images.
    """
    base = base_record(extractor.denoiser, weights=True)
    return {
        "model": {
            "name": _plain_path(base.name),
            "revision": base.revision,
            "class": base.model_class,
            "dtype": base.dtype,
            "noise_process": _process(extractor.denoiser.schedule),
            "weights": base.weights,
        },
        "data": {
            "name": _plain_path(data.name),
            "split": data.split,
            "image_column": data.image_column,
            "label_column": data.label_column,
            "rows": rows,
        },
        "features": {
            "layers": list(extractor.layers),
            "where": extractor.where,
            "levels": [{k: v for k, v in level.to_dict().items() if k in _LEVEL} for level in extractor.levels],
            "noise": extractor.noise.policy,
            "ensemble_size": extractor.ensemble_size,
            "pooling": extractor.pooling,
            "seed": extractor.seed,
            "sample_posterior": extractor.sample_posterior,
            "image_size": list(image_size),
            "prompt": prompt,
            "class_label": class_label,
            "dtype": dtype,
        },
    }


_LEVEL = ("timestep", "alpha", "sigma")


def _process(schedule: NoiseSchedule) -> str:
    """Its kind; of masks with the side of their patches, which the levels do not tell."""
    return f"patch_mask {schedule.patch_size}" if schedule.kind == "patch_mask" else schedule.kind


def _plain_path(name: str | None) -> str | None:
    """`./model/` and `model` are one path; a Hub id stays as it is."""
    return name if name is None or not os.path.exists(name) else os.path.normpath(name)
