"""`CachedData`: training data that read latents and teacher features from caches instead of making them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.base import TrainData
from diffusers_repr.data.latents import open_latents
from diffusers_repr.data.numpy_latents import NumpyLatents
from diffusers_repr.data.teacher_features import open_features
from diffusers_repr.data.train_data import ImageTrainData
from diffusers_repr.data.transforms import Moves, move_annotations, to_unit
from diffusers_repr.store.tensor_cache import TensorCache
from diffusers_repr.store.tensors import INDEX


class CachedData(TrainData):
    """Data whose samples bring `moments`, `features` and `features_global` from caches.

    A sample has both mirrors, `(2, ...)`; `on_device` chooses by the very draw that would flip the image, so that a
    run from the cache sees what a run without it sees.

    Args:
        images: The data the caches were made of: labels, captions, and the pixels where they are needed.
        latents: Moments; None: images are loaded.
        features: Teacher features by the encoder's name.
        needs_pixels: Load images beside the latents.

    Attributes:
        images: As given.
        latents: As given.
        features: As given.
        needs_pixels: Whether images are loaded.

    Raises:
        ValueError: If there is nothing cached.
    """

    def __init__(
        self,
        images: ImageTrainData,
        latents: TensorCache | NumpyLatents | None = None,
        features: Mapping[str, TensorCache] | None = None,
        needs_pixels: bool = False,
    ) -> None:
        self.images, self.latents, self.features = images, latents, dict(features or {})
        self.needs_pixels = needs_pixels or latents is None
        if latents is None and not self.features:
            raise ValueError("CachedData needs latents or features; use the images themselves without a cache.")

    @classmethod
    def open(
        cls, images: ImageTrainData, *, vae: Any = None, encoders: Sequence[Any] = (), needs_pixels: bool = False
    ) -> CachedData:
        """The caches that `images.config` names, checked against the run.

        Args:
            images: Of the run.
            vae: Of the run; needed for `latents_dir`.
            encoders: Of the run. Those without a cache work on images, which are then loaded; needed for
                `features_dir`.
            needs_pixels: Load images beside the latents.

        Raises:
            FileNotFoundError: If a cache is not there.
            ValueError: If a cache is not finished or was made otherwise, or the run has no use for it.
        """
        config = images.config
        latents: TensorCache | NumpyLatents | None = None
        features = {}
        if config.latents_dir is not None:
            if vae is None:
                raise ValueError(
                    "latents_dir is set, but the run has no VAE to check the cache against. Pass the VAE it was made "
                    "with, or leave latents_dir out for a model of pixels."
                )
            latents = open_latents(config.latents_dir, images, vae, config.random_flip)
        if config.features_dir is not None:
            opened = {e.name: open_features(config.features_dir, images, e, config.random_flip) for e in encoders}
            features = {name: cache for name, cache in opened.items() if cache is not None}
            if not features:
                names = ", ".join(opened) or "none"
                raise FileNotFoundError(
                    f"features_dir {config.features_dir!r} holds no features of the run's encoders ({names}). Make "
                    "them by `diffusers-repr cache --cache_features`, or leave features_dir out."
                )
        live = [encoder for encoder in encoders if encoder.name not in features]
        for encoder in live:
            if not hasattr(encoder, "encode_pixels"):
                raise FileNotFoundError(
                    f"Encoder {encoder.name!r} is not loaded, and {config.features_dir!r} holds no features "
                    "of it. Load it, or make its cache by `diffusers-repr cache --cache_features`."
                )
        return cls(images, latents, features, needs_pixels or bool(live))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = {}
        row = index
        if self.latents is not None:
            stored = self.latents[index]
            row, sample["moments"] = int(stored[INDEX]), stored["moments"]
        for name, cache in self.features.items():
            stored = cache[index]
            row = int(stored[INDEX])
            sample.setdefault("features", {})[name] = stored["tokens"]
            if "global" in stored:
                sample.setdefault("features_global", {})[name] = stored["global"]
        if self.needs_pixels or self.images.images.annotated:
            read, tensors = self.images.images.sample(index)
            if read != row:
                raise ValueError(
                    f"For image {index} the cache holds row {row}, and the run reads row {read}: what can be read has "
                    "changed, or the cache was made without the column of masks. Make it with the settings of the run."
                )
            sample |= {name: value for name, value in tensors.items() if self.needs_pixels or name != "pixel_values"}
        return {**sample, **self.images.annotations(row)}

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As `TrainData.on_device`; with `random_flip`, `transforms.draw_flips(B)` is the one draw."""
        out = dict(batch)
        index = batch["index"]
        moves = Moves.draw(len(index), index.device, self.images.config.random_flip, 0, 0, 0)
        mirrored = torch.zeros_like(index, dtype=torch.bool) if moves.mirrored is None else moves.mirrored
        if "moments" in batch:
            out["moments"] = _chosen(batch["moments"], mirrored)
        for key in ("features", "features_global"):
            if key in batch:
                out[key] = {name: _chosen(values, mirrored) for name, values in batch[key].items()}
        if "pixel_values" in batch:
            out["pixel_values"] = moves.images(to_unit(batch["pixel_values"]))
        return out | move_annotations(batch, moves, self.images.images.size, self.images.config.ignore_index)

    def fingerprint(self) -> dict[str, Any]:
        """As `TrainData.fingerprint`, with the recipes of the caches."""
        features = {name: cache.layout.recipe for name, cache in self.features.items()}
        latents = None if self.latents is None else self.latents.layout.recipe
        return {**self.images.fingerprint(), "latents": latents, "features": features}

    @property
    def name(self) -> str | None:
        """Of the data set; None if it has none."""
        return self.images.name

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class id; None without labels."""
        return self.images.class_names


def _chosen(values: Tensor, mirrored: Tensor) -> Tensor:
    """`(B, mirrors, ...)` to `(B, ...)` float32: the second mirror where `mirrored`."""
    rows = torch.arange(len(values), device=values.device)
    return values[rows, mirrored.long().to(values.device)].float()
