"""`FeatureExtractor`: images to features, the same for an image whatever its neighbours and the batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from diffusers_repr.capture import capture, check_layers
from diffusers_repr.capture.caches import refuse_caches
from diffusers_repr.capture.capture import Where
from diffusers_repr.denoiser import Condition, Denoiser
from diffusers_repr.denoiser.family import Grid
from diffusers_repr.denoiser.hooks import Turn
from diffusers_repr.denoiser.require import require_denoiser
from diffusers_repr.denoiser.sizes import ImageSize, warn_if_far_larger
from diffusers_repr.features.noise_policy import NoiseSource, image_keys
from diffusers_repr.features.output import FeatureOutput
from diffusers_repr.features.pooling import check_pooling, is_linear, leaves_maps, pool
from diffusers_repr.features.posterior import EncodedImages, SamplePosterior, check_sample_posterior
from diffusers_repr.features.source import BaseFeatureSource, SourceArguments
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.noise import LevelLike, NoiseLevel

_FIELDS = ("timestep", "nsr", "half_log_snr", "alpha", "sigma", "alpha_dot", "sigma_dot")


@dataclass(frozen=True)
class ImageBatch:
    """One forward of the network.

    Attributes:
        x_t: `(n, C, h, w)`; of videos `(n, C, f, h, w)`.
        level: One level, or one per row.
        condition: Network inputs for the rows.
        cells: For each row, its place in the results: `level * images + image`; never falls.
    """

    x_t: Tensor
    level: NoiseLevel
    condition: Mapping[str, Any]
    cells: list[int]


class FeatureExtractor(BaseFeatureSource):
    """Reads named layers of a denoiser at chosen noise levels.

    Threads may share one, and its network with samplers: each call gives what it gives alone.

    Args:
        denoiser: Any `Denoiser`.
        layers: Full module paths; `list_layers(denoiser)` shows them, `presets` has published choices.
        timestep: Training timestep or `NoiseLevel` (larger is noisier), or a list of them.
        noise: Where noise comes from: `per_image`, `shared`, `fresh` or `clean`; see `NoiseSource`.
        ensemble_size: Noise draws an image; features are averaged in float32, before a non-linear pooling.
        pooling: None, `mean`, `max`, `adaptive:P`, or `map:P` for maps of at most P x P cells; see `pool`.
        batch_size: Rows of one forward, ensemble members and levels counted; None runs all at once.
        output_device: Where features are kept; the model's device if None.
        seed: Of the noise, and of the VAE's posterior if sampled.
        where: `output`, `input` or `residual`, as in `capture`.
        image_size: Resize images to (H, W) or a square; None: to the model's own size; `"keep"`: not at all. The whole
            image is stretched, the aspect ratio is not kept. As an attribute: (H, W) or `"keep"`.
        sample_posterior: Draw the VAE's latents, seeded, instead of taking their mean: once an image (True), or once
            for each member of the ensemble (`"per_member"`, as DIFT's code does); an image is encoded once either way.
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`, as tqdm and pipelines
            do.

    Raises:
        ValueError, TypeError: For layers, levels, policies or poolings that do not exist, before anything runs.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> extractor = FeatureExtractor(Denoiser(unet, DDPMScheduler()), "mid_block", 200, pooling="mean")
        >>> extractor(torch.rand(3, 1, 8, 8))["mid_block"].shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        layers: str | Sequence[str],
        timestep: LevelLike | Sequence[LevelLike],
        noise: str = "per_image",
        ensemble_size: int = 1,
        pooling: str | None = None,
        batch_size: int | None = None,
        output_device: str | torch.device | None = None,
        seed: int = 0,
        *,
        where: str = "output",
        image_size: ImageSize = None,
        sample_posterior: SamplePosterior = False,
        progress_bar: Callable[..., Any] | None = None,
    ) -> None:
        require_denoiser(denoiser)
        if getattr(denoiser.pipe, "class_token", None) is not None:
            warnings.warn(
                "This network was trained with a class token in its sequence (REG); features are read without it.",
                stacklevel=2,
            )
        self.denoiser = denoiser
        self.layers = list(check_layers(denoiser.model, layers))
        self.levels, self.many = _resolve(denoiser, timestep)
        self.noise = NoiseSource(noise, seed)
        self.ensemble_size = check_whole("ensemble_size", ensemble_size)
        self.batch_size = None if batch_size is None else check_whole("batch_size", batch_size)
        if noise == "clean" and self.ensemble_size > 1:
            raise ValueError(f"ensemble_size={ensemble_size} with noise='clean' would average equal features; use 1.")
        if where not in get_args(Where):
            raise ValueError(f"where={where!r}; expected one of {', '.join(get_args(Where))}.")
        self.pooling = check_pooling(pooling)
        self.output_device = torch.device(output_device) if output_device is not None else None
        self.seed, self.where = self.noise.seed, where
        self.image_size: tuple[int, int] | Literal["keep"] = denoiser.resize_to(image_size) or "keep"
        self.sample_posterior = check_sample_posterior(sample_posterior, denoiser, noise)
        self.progress_bar = progress_bar
        self._prompts: dict[Any, dict[str, Any]] = {}
        self._stream = Turn()  # the thread that draws from the stream of fresh noise

    @torch.no_grad()
    def from_pixels(self, pixels: Tensor, **arguments: Unpack[SourceArguments]) -> FeatureOutput:
        """As a call, from `(B, C, H, W)` or `(B, C, frames, H, W)` in [-1, 1]; `image_size` is not applied."""
        early = is_linear(self.pooling)  # pool at once where that equals pooling the ensemble's mean
        sums = _Sums(len(self.levels) * len(pixels), self.output_device or self.denoiser.device)
        places: dict[str, Grid] = {}
        with self.reading():
            for batch in self.batches(pixels, **arguments):
                size = tuple(batch.x_t.shape[2:])

                def keep(feature: Tensor, path: str, batch: ImageBatch = batch, size: tuple[int, ...] = size) -> None:
                    self._check_rows(feature, path, len(batch.cells))
                    self._place(feature, path, size, places)
                    sums.add(path, pool(feature, self.pooling if early else None, places.get(path)), batch.cells)

                self.read(batch, keep)
        features = {}
        for layer in self.layers:
            mean = sums.totals.pop(layer)
            if self.ensemble_size > 1:
                mean /= self.ensemble_size
            if not early:
                mean = pool(mean, self.pooling, places.get(layer))
            if not bool(torch.isfinite(mean).all()):
                raise FloatingPointError(
                    f"Layer {layer!r} of {type(self.denoiser.model).__name__} ({self.denoiser.dtype}) gave NaN or "
                    "infinite features. Load the model in float32 or bfloat16, or take an earlier layer."
                )
            features[layer] = mean.unflatten(0, (len(self.levels), len(pixels))) if self.many else mean
        level = self.levels if self.many else self.levels[0]
        places = {} if self.pooling is not None and leaves_maps(self.pooling) else places  # tokens became maps
        return FeatureOutput(features, level, places, self.pooling, tuple(pixels.shape[2:]))

    def with_gradient(self, pixels: Tensor, **arguments: Unpack[SourceArguments]) -> FeatureOutput:
        """As `from_pixels`, of one level and one draw of noise, as a graph of the network's parameters.

        The network's mode is left as it is; what encodes images has no gradient.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1].
            **arguments: As of every source.

        Raises:
            ValueError: With several levels or draws of noise.
        """
        if self.many or self.ensemble_size > 1:
            raise ValueError("Features with a gradient are of one level and one draw; pass timestep=T, no ensemble.")
        with torch.no_grad():
            (batch,) = self.replace(batch_size=None, progress_bar=None).batches(pixels, **arguments)
        features: dict[str, Tensor] = {}
        places: dict[str, Grid] = {}

        def keep(feature: Tensor, path: str) -> None:
            self._check_rows(feature, path, len(pixels))
            self._place(feature, path, tuple(batch.x_t.shape[2:]), places)
            features[path] = pool(feature, self.pooling, places.get(path))

        self.read(batch, keep)
        return FeatureOutput(features, self.levels[0], places, self.pooling, tuple(pixels.shape[2:]))

    def read(self, batch: ImageBatch, keep: Callable[[Tensor, str], None]) -> None:
        """One forward of the network, left after the last layer; a subclass has another way to its features.

        Args:
            batch: What is run.
            keep: Is given the feature of each layer, and its path.
        """
        with capture(self.denoiser.model, self.layers, self.where, transform=keep):  # type: ignore[arg-type]
            self.denoiser.predict(batch.x_t, batch.level, batch.condition)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What holds while the network is read: eval mode, activations of its own calls, noise for one thread.

        Raises:
            ValueError: If the network uses activations of earlier calls.
            RuntimeError: With `fresh` noise, if another thread is drawing it.
        """
        refuse_caches(self.denoiser.model, "so features would hold features of other calls")
        fresh = self.noise.policy == "fresh"
        if fresh:
            self._stream.take(
                "Another thread is using this extractor: noise='fresh' is one stream, and who draws next would be "
                "chance. Give each thread an extractor of its own, extractor.replace(), or take 'per_image'."
            )
        try:
            with self.denoiser.evaluating():
                yield
        finally:
            if fresh:
                self._stream.end()

    def batches(
        self,
        pixels: Tensor,
        prompt: str | Sequence[str] | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        embeddings: Mapping[str, Any] | None = None,
        ids: Sequence[Any] | None = None,
    ) -> Iterator[ImageBatch]:
        """The forwards that an extraction makes: each image encoded once, levels and members batched.

        Args:
            pixels: `(B, C, H, W)` or `(B, C, frames, H, W)` in [-1, 1].
            prompt: As in `__call__`.
            class_labels: As in `__call__`.
            embeddings: As in `__call__`.
            ids: As in `__call__`.
        """
        count, size = len(pixels), tuple(pixels.shape[2:])
        keys = image_keys(ids, pixels)
        self.denoiser.check_size(size)
        if self.image_size == "keep":
            warn_if_far_larger(type(self.denoiser.model).__name__, size, self.denoiser.resize_to())
        condition = self.denoiser.condition(
            prompt, class_labels=class_labels, embeddings=embeddings, batch=count, size=size, cache=self._prompts
        )
        step = self.batch_size or count
        encoded = EncodedImages(self.denoiser, pixels, keys, self.sample_posterior, self.seed, step)
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
                yield self._batch(encoded, condition, cells[start : start + step], count)
                if bar is not None:
                    bar.update(1)
        finally:
            if bar is not None:
                bar.close()

    def _batch(
        self, encoded: EncodedImages, condition: Condition, cells: list[tuple[int, int, int]], count: int
    ) -> ImageBatch:
        levels = [level for level, _, _ in cells]
        rows = [image for _, image, _ in cells]
        level = self.levels[levels[0]]
        if len(set(levels)) > 1:
            stacked: dict[str, Any] = {
                f: torch.tensor([getattr(self.levels[at], f) for at in levels]) for f in _FIELDS
            }
            level = NoiseLevel(**stacked, schedule=level.schedule)
        members = [member for _, _, member in cells]
        clean = encoded.take(rows, members)
        noise = self.noise.draw([encoded.keys[row] for row in rows], members, clean.shape[1:])
        if noise is None:
            x_t = clean * self.denoiser.schedule.clean_alpha
        else:
            x_t = self.denoiser.add_noise(clean, level, noise.to(clean.device))
        return ImageBatch(
            x_t, level, condition.take(rows), [at * count + row for at, row in zip(levels, rows, strict=True)]
        )

    def _check_rows(self, feature: Tensor, path: str, rows: int) -> None:
        if feature.ndim < 2 or feature.shape[0] != rows:
            raise ValueError(
                f"Layer {path!r} gave shape {tuple(feature.shape)} for a batch of {rows}: it holds no feature per "
                "image. `list_layers(denoiser)` shows the layers that do."
            )

    def _place(self, feature: Tensor, path: str, size: tuple[int, ...], places: dict[str, Grid]) -> None:
        if feature.ndim == 3 and path not in places:
            found = self.denoiser.token_grid(path, feature.shape[1], size)
            if found is not None:
                places[path] = found

    def replace(self, **changes: Any) -> FeatureExtractor:
        """A copy with other settings; prompts that are encoded already are shared."""
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
        copy = self._like({**settings, **changes})
        if copy.denoiser is self.denoiser:
            copy._prompts = self._prompts
        return copy

    def _like(self, settings: dict[str, Any]) -> FeatureExtractor:
        """One of its class with other settings."""
        return FeatureExtractor(**settings)

    @property
    def resize(self) -> tuple[int, int] | None:
        """(H, W) to which images are brought, as `to_pixels` takes it: None if they keep theirs."""
        return None if self.image_size == "keep" else self.image_size

    def __repr__(self) -> str:
        levels = ", ".join(f"{float(level.timestep):g}" for level in self.levels)
        read = "" if self.where == "output" else f", where={self.where!r}"
        members = "" if self.ensemble_size == 1 else f", ensemble_size={self.ensemble_size}"
        return (
            f"FeatureExtractor({type(self.denoiser.model).__name__}, layers={self.layers}{read},\n"
            f"    timestep={f'[{levels}]' if self.many else levels}, noise={self.noise.policy!r}, seed={self.seed}"
            f"{members}, pooling={self.pooling!r}, image_size={self.image_size!r})"
        )


class _Sums:
    """Running float32 sums over ensemble members, one row a cell; only sums are held, never single members."""

    def __init__(self, cells: int, device: torch.device) -> None:
        self.cells, self.device = cells, device
        self.totals: dict[str, Tensor] = {}

    def add(self, layer: str, rows: Tensor, cells: list[int]) -> None:
        """Add each row to its cell; equal cells stand side by side, and are summed in the order of the rows."""
        if layer not in self.totals:
            self.totals[layer] = torch.zeros(self.cells, *rows.shape[1:], device=self.device)
        total = self.totals[layer]
        low, high = cells[0], cells[-1] + 1
        if len(cells) > high - low:
            summed = torch.zeros(high - low, *rows.shape[1:], device=rows.device)
            for row, cell in zip(rows, cells, strict=True):
                summed[cell - low] += row
            rows = summed
        total[low:high] += rows.to(self.device)


def _resolve(denoiser: Denoiser, timestep: Any) -> tuple[list[NoiseLevel], bool]:
    """Resolved levels, and whether a list of them was asked for."""
    many = isinstance(timestep, (list, tuple, range)) or getattr(timestep, "ndim", 0) == 1
    levels = [denoiser.level(t) for t in (timestep if many else [timestep])]
    if not levels:
        raise ValueError("No timesteps: the list is empty.")
    for level in levels:
        if isinstance(level.timestep, Tensor):
            raise ValueError(f"{level!r} holds one level per sample; pass a list of levels, each a single number.")
    return levels, many


__all__ = ["FeatureExtractor", "ImageBatch"]
