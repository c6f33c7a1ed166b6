"""`FeatureExtractor`: images to features, the same for an image whatever its neighbours and the batch size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture import capture, check_layers
from diffusers_repr.denoiser import Condition, Denoiser
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.features.noise_policy import NoiseSource, keyed_generator, pixel_keys
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.pooling import Place, check_pooling, is_linear, pool
from diffusers_repr.noise import NoiseLevel

Timestep = int | float | NoiseLevel
_FIELDS = ("timestep", "nsr", "half_log_snr", "alpha", "sigma", "alpha_dot", "sigma_dot")
_PROMPTS_KEPT = 256


@dataclass(frozen=True)
class Batch:
    """One forward of the network.

    Attributes:
        x_t: `(n, C, h, w)`.
        level: One level, or one per row.
        condition: Network inputs for the rows.
        cells: For each row, its place in the results: `level * images + image`.
    """

    x_t: Tensor
    level: NoiseLevel
    condition: Mapping[str, Any]
    cells: list[int]


class _Recent(OrderedDict[Any, dict[str, Any]]):
    """Keeps the last encoded prompts, so that a data set of captions does not fill the memory."""

    def __setitem__(self, key: Any, value: dict[str, Any]) -> None:
        super().__setitem__(key, value)
        while len(self) > _PROMPTS_KEPT:
            self.popitem(last=False)


class FeatureExtractor:
    """Reads named layers of a denoiser at chosen noise levels.

    Args:
        denoiser: Any `Denoiser`.
        layers: Full module paths; `list_layers(denoiser)` shows them, `presets` has published choices.
        timestep: Training timestep or `NoiseLevel` (larger is noisier), or a list of them.
        noise: Where noise comes from: `per_image`, `shared`, `fresh` or `clean`; see `NoiseSource`.
        ensemble_size: Noise draws an image; features are averaged in float32, before a non-linear pooling.
        pooling: None, `mean`, `max` or `adaptive:P`.
        batch_size: Rows of one forward, ensemble members and levels counted; None runs all at once.
        output_device: Where features are kept; the model's device if None.
        seed: Of the noise, and of the VAE's posterior if sampled.
        where: `output`, `input` or `residual`, as in `capture`.
        image_size: Resize images to (H, W) or a square.
        sample_posterior: Draw the VAE's latents (per image, seeded) instead of taking their mean.
        progress_bar: `progress_bar(total=n)` gives a context with `.update(k)`, as tqdm and pipelines do.

    Raises:
        ValueError, TypeError: For layers, levels, policies or poolings that do not exist, before anything runs.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        layers: str | Sequence[str],
        timestep: Timestep | Sequence[Timestep],
        noise: str = "per_image",
        ensemble_size: int = 1,
        pooling: str | None = None,
        batch_size: int | None = None,
        output_device: str | torch.device | None = None,
        seed: int = 0,
        *,
        where: str = "output",
        image_size: int | tuple[int, int] | None = None,
        sample_posterior: bool = False,
        progress_bar: Callable[..., Any] | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.layers = list(check_layers(denoiser.model, layers))
        self.many = isinstance(timestep, (list, tuple, range))
        self.levels = [denoiser.level(t) for t in (timestep if self.many else [timestep])]  # type: ignore[union-attr,list-item]
        if not self.levels:
            raise ValueError("No timesteps: the list is empty.")
        self.noise = NoiseSource(noise, seed)
        for name, value in (("ensemble_size", ensemble_size), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}.")
        if noise == "clean" and ensemble_size > 1:
            raise ValueError(f"ensemble_size={ensemble_size} with noise='clean' would average equal features; use 1.")
        self.ensemble_size, self.batch_size = ensemble_size, batch_size
        self.pooling = check_pooling(pooling)
        self.output_device = torch.device(output_device) if output_device is not None else None
        self.seed, self.where, self.image_size = seed, where, image_size
        self.sample_posterior, self.progress_bar = sample_posterior, progress_bar
        self._prompts = _Recent()

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        *,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        embeddings: Mapping[str, Any] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> FeatureOutput:
        """Features of images.

        Args:
            images: PIL images, numpy arrays or tensors of one size; see `to_pixels`.
            prompt: One for all images or one per image.
            class_labels: One id for all images or one per image.
            embeddings: Ready network inputs; see `Denoiser.condition`.
            ids: A stable name per image, the key of its noise; its pixels if None.
        """
        pixels = to_pixels(images, self.denoiser.image_channels, self.image_size)
        count = len(pixels)
        totals: dict[str, list[Tensor | None]] = {layer: [None] * (len(self.levels) * count) for layer in self.layers}
        places: dict[str, Place] = {}
        early = is_linear(self.pooling)  # pool at once where that equals pooling the ensemble's mean
        with self.denoiser.evaluating():
            for batch in self.batches(pixels, prompt, class_labels, embeddings, ids):
                size = (batch.x_t.shape[2], batch.x_t.shape[3])

                def keep(feature: Tensor, path: str, size: tuple[int, int] = size) -> Tensor:
                    self._place(feature, path, size, places)
                    return pool(feature, self.pooling if early else None, places.get(path)).float().to(self._target)

                with capture(self.denoiser.model, self.layers, self.where, transform=keep) as tape:  # type: ignore[arg-type]
                    self.denoiser.predict(batch.x_t, batch.level, batch.condition)
                for layer, rows in tape.features.items():
                    for row, cell in zip(rows, batch.cells, strict=True):
                        before = totals[layer][cell]
                        totals[layer][cell] = row if before is None else before + row
        return self._pack(totals, count, places, early)

    def batches(
        self,
        pixels: Tensor,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        embeddings: Mapping[str, Any] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> Iterator[Batch]:
        """The forwards that an extraction makes: each image encoded once, levels and members batched.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1].
            prompt: As in `__call__`.
            class_labels: As in `__call__`.
            embeddings: As in `__call__`.
            ids: As in `__call__`.
        """
        count, size = len(pixels), (pixels.shape[2], pixels.shape[3])
        if ids is not None and len(ids) != count:
            raise ValueError(f"{len(ids)} ids for {count} images; pass one per image.")
        keys = [str(i) for i in ids] if ids is not None else pixel_keys(pixels)
        self.denoiser.check_size(size)
        condition = self.denoiser.condition(
            prompt, class_labels=class_labels, embeddings=embeddings, batch=count, size=size, cache=self._prompts
        )
        x0 = self._encode(pixels, keys)
        cells = [
            (level, image, member)
            for level in range(len(self.levels))
            for image in range(count)
            for member in range(self.ensemble_size)
        ]
        step = self.batch_size or len(cells)
        bar = self.progress_bar(total=-(-len(cells) // step)) if self.progress_bar is not None else None
        try:
            for start in range(0, len(cells), step):
                yield self._batch(x0, keys, condition, cells[start : start + step], count)
                if bar is not None:
                    bar.update(1)
        finally:
            if bar is not None:
                bar.close()

    def _encode(self, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        step = self.batch_size or len(pixels)
        parts = []
        for start in range(0, len(pixels), step):
            generators = None
            if self.sample_posterior:
                generators = [keyed_generator(self.seed, key, "posterior") for key in keys[start : start + step]]
            parts.append(
                self.denoiser.encode_pixels(
                    pixels[start : start + step], sample=self.sample_posterior, generator=generators
                )
            )
        return torch.cat(parts)

    def _batch(
        self, x0: Tensor, keys: list[str], condition: Condition, cells: list[tuple[int, int, int]], count: int
    ) -> Batch:
        levels = [level for level, _, _ in cells]
        rows = [image for _, image, _ in cells]
        level = self.levels[levels[0]]
        if len(set(levels)) > 1:
            stacked = {f: torch.tensor([getattr(self.levels[at], f) for at in levels]) for f in _FIELDS}
            level = NoiseLevel(**stacked)
        clean = x0[torch.tensor(rows, device=x0.device)]
        noise = self.noise.draw([keys[row] for row in rows], [member for _, _, member in cells], x0.shape[1:])
        x_t = clean if noise is None else self.denoiser.add_noise(clean, level, noise.to(clean.device))
        return Batch(
            x_t, level, condition.take(rows), [at * count + row for at, row in zip(levels, rows, strict=True)]
        )

    @property
    def _target(self) -> torch.device:
        return self.output_device or self.denoiser.device

    def _place(self, feature: Tensor, path: str, size: tuple[int, int], places: dict[str, Place]) -> None:
        if feature.ndim == 3 and path not in places:
            found = self.denoiser.family.grid(self.denoiser.config, feature.shape[1], size)
            if found is not None:
                places[path] = found

    def _pack(
        self, totals: dict[str, list[Tensor | None]], count: int, places: dict[str, Place], early: bool
    ) -> FeatureOutput:
        features = {}
        for layer, rows in totals.items():
            mean = torch.stack([row for row in rows if row is not None])
            if self.ensemble_size > 1:
                mean = mean / self.ensemble_size
            if not early:
                mean = pool(mean, self.pooling, places.get(layer))
            features[layer] = mean.unflatten(0, (len(self.levels), count)) if self.many else mean
        level = self.levels if self.many else self.levels[0]
        return FeatureOutput(features, level, places, self.pooling)

    def replace(self, **changes: Any) -> FeatureExtractor:
        """A copy with other settings."""
        settings = {
            "denoiser": self.denoiser,
            "layers": self.layers,
            "timestep": self.levels if self.many else self.levels[0],
            "noise": self.noise.policy,
            "ensemble_size": self.ensemble_size,
            "pooling": self.pooling,
            "batch_size": self.batch_size,
            "output_device": self.output_device,
            "seed": self.seed,
            "where": self.where,
            "image_size": self.image_size,
            "sample_posterior": self.sample_posterior,
            "progress_bar": self.progress_bar,
        }
        return FeatureExtractor(**{**settings, **changes})


__all__ = ["Batch", "FeatureExtractor", "Timestep"]
