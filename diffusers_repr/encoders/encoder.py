"""`Encoder`: images to a vector an image and a vector a patch, by a frozen network with its own preprocessing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.encoders.denoiser import DenoiserSource
from diffusers_repr.encoders.module import ModuleSource
from diffusers_repr.encoders.output import EncoderOutput
from diffusers_repr.encoders.own import load_own, refuse_options
from diffusers_repr.encoders.pipelines import is_encoder_pipeline, load_pipeline_encoder
from diffusers_repr.encoders.positions import Positions
from diffusers_repr.encoders.preprocessing import expand_channels, preprocess
from diffusers_repr.encoders.source import Source, device_of
from diffusers_repr.encoders.transformer import load_transformer
from diffusers_repr.hub.base_record import BaseRecord
from diffusers_repr.hub.errors import HubError
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.noise import NoiseLevel


class Encoder:
    """A frozen network that turns images into features.

    No `nn.Module`: as an attribute of one it is in neither its state dict nor its parameters. Features are made in
    eval mode, without gradients and outside any autocast, so that they do not depend on what is trained around them;
    the random state is not touched.

    Args:
        source: The network and how it is read; made by `from_pretrained`, `from_denoiser` or `from_module`.
        name: What it is called in caches and logs.
        revision: Of a Hub id.
        place: What `load_encoder` finds it by; None for one that was made of parts.

    Example:
        >>> net = nn.Conv2d(3, 5, 4, stride=4)
        >>> encoder = Encoder.from_module(net, patch_size=4)
        >>> encoder(torch.rand(2, 3, 8, 12))
        EncoderOutput(global=(2, 5), tokens=(2, 6, 5), grid=(2, 3))
    """

    def __init__(self, source: Source, name: str, revision: str | None = None, place: str | None = None) -> None:
        self.source, self.name, self.revision, self.place = source, name, revision, place

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        layer: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        pooling: str | None = None,
        positions: Positions = "transformers",
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        token: str | None = None,
        name: str | None = None,
    ) -> Encoder:
        """A vision transformer of the transformers library, or an encoder that training here made.

        `list_encoder_families()` gives the types of transformers that are known. Of ours a `SemanticEncoder`, by its
        own folder or that of its diffusion autoencoder: its code, of images of the size it was trained on.

        Images of 256 pixels and more get one token for every 16 x 16 of them from networks of patch 14 or 16 that
        were made for 224 pixels or more: 224 pixels and 16 x 16 tokens at 256 for patch 14, 448 and 32 x 32 at 512
        (REPA, arXiv 2410.06940). All else is resized to the network's own size, that of its image processor or of
        its config, by the short side. Position embeddings are resampled where the size is not the configured one.

        Args:
            id_or_folder: Hub id, or a folder with `config.json` and safetensors; or a `TokenGenerationPipeline`, of
                which the encoder is read, global features being the mean of its tokens.
            revision: Branch, tag or commit on the Hub.
            layer: Read the output of this block, without the final norm: 0 is the first, -1 the last. None: the last
                patch tokens, after the final norm where the family's docstring does not say otherwise.
            image_size: Resize to (H, W) or a square instead; a multiple of the patch.
            pooling: Global features: `cls`, `mean`, or None for the family's own.
            positions: How position embeddings are resampled: `transformers`, as that library does, and nearly so
                DINOv2's own code; or `repa`, as REPA's code, with antialiasing, for DINOv2, ViT (DINO, MoCo v3) and
                MAE. It is a part of the fingerprint.
            mean: Of pixels in [0, 1], one number or one a channel, instead of that of the files: for networks of other
                than three channels without a `preprocessor_config.json`.
            std: As `mean`.
            dtype: The network's; outputs are float32 whatever it is.
            device: Where it goes.
            token: Hub token.
            name: The last part of the id or folder if None.

        Raises:
            TypeError: If the `model_type` in the config has no family.
            ValueError: For a layer, size, pooling or positions that the network does not have, or files that lack
                weights.
            OSError: If the folder or repository does not exist or cannot be read.
        """
        place = (id_or_folder, revision, token)

        def of_pipeline() -> tuple[Source, str | None]:
            how = None if positions == "transformers" else positions
            others: dict[str, Any] = {"layer": layer, "mean": mean, "std": std, "positions": how}
            return load_pipeline_encoder(*place, dtype, image_size, pooling, **others)

        def of_network() -> tuple[Source, str | None]:
            own = load_own(*place, dtype, image_size)
            if own is None:
                return load_transformer(*place, dtype, layer, image_size, pooling, positions, mean, std)
            refuse_options(layer=layer, pooling=pooling, mean=mean, std=std)
            return own

        if Path(id_or_folder).is_dir() and is_encoder_pipeline(*place):
            source, loaded = of_pipeline()
        else:
            try:
                source, loaded = of_network()
            except HubError:  # it has no config.json
                if Path(id_or_folder).is_dir() or not is_encoder_pipeline(*place):
                    raise
                source, loaded = of_pipeline()
        source.module.to(device)
        return cls(source, name or Path(id_or_folder).resolve().name, loaded, str(id_or_folder))

    @classmethod
    def from_denoiser(
        cls,
        denoiser: Denoiser,
        layer: str,
        timestep: int | float | NoiseLevel,
        condition: str | int | Mapping[str, Any] | None = None,
        noise_seed: int = 0,
        *,
        image_size: int | tuple[int, int] | None = None,
        name: str | None = None,
    ) -> Encoder:
        """A layer of a denoiser at one noise level; global features are the mean of its tokens or map.

        Args:
            denoiser: Of any family. It is not copied: its features follow its weights.
            layer: Full module path; `list_layers(denoiser)` shows them.
            timestep: Training timestep or `NoiseLevel`.
            condition: For all images: a prompt, a class id, or a mapping of embeddings; None is the null condition.
            noise_seed: Noise depends on it and on the image alone, not on the batch.
            image_size: Resize to (H, W) or a square.
            name: `layer@timestep` if None.

        Raises:
            ValueError, TypeError: For layers, levels and conditions the denoiser does not have.
        """
        source = DenoiserSource(denoiser, layer, timestep, condition, noise_seed, image_size)
        told = f"{layer}@{source.timestep:g}"
        place = None if denoiser.name is None else f"{denoiser.name}:{told}"
        return cls(source, name or told, denoiser.revision, place)

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        *,
        patch_size: int,
        forward: Callable[[Tensor], Any] | None = None,
        prefix_tokens: int = 0,
        pooling: str | None = None,
        channels: int = 3,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        image_size: int | tuple[int, int] | None = None,
        name: str | None = None,
    ) -> Encoder:
        """Any network that gives tokens `(B, N, D)` or a map `(B, D, h, w)`.

        Args:
            module: Takes `(B, C, H, W)`. It is not copied, and neither its mode nor `requires_grad` is changed.
            patch_size: Pixels a token, along a side.
            forward: What is called instead of the module, e.g. `module.forward_features`.
            prefix_tokens: Tokens in front of those of the patches; the first is taken for a class token.
            pooling: Global features: `cls` (None where there are prefix tokens) or `mean` (None without).
            channels: Of the images.
            mean: Of pixels in [0, 1], one number or one a channel; with the default, pixels are in [-1, 1].
            std: As `mean`.
            image_size: Resize to (H, W) or a square; None keeps the size.
            name: The module's class if None.
        """
        source = ModuleSource(module, patch_size, forward, prefix_tokens, pooling, channels, mean, std, image_size)
        return cls(source, name or type(module).__name__)

    @property
    def dim(self) -> int:
        """Channels of the features, D."""
        return self.source.dim

    @property
    def channels(self) -> int:
        """Channels of the images it takes; grey ones are repeated."""
        return self.source.channels

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.source.module

    @property
    def device(self) -> torch.device:
        """Where the network lies."""
        return device_of(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating dtype."""
        return floating_dtype(self.module)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Encoder:
        """Move the network; returns the encoder itself."""
        nn.Module.to(self.module, device=device, dtype=dtype)
        return self

    def grid_for(self, size: tuple[int, int]) -> tuple[int, int]:
        """Token grid (h, w) of images of `size` (H, W)."""
        return self.source.grid(self.source.size((size[0], size[1])))

    def with_image_size(self, image_size: tuple[int, int]) -> Encoder:
        """The same network, which images of (H, W) are resized for; nothing is copied but the settings."""
        resized = copy.copy(self)
        resized.source = copy.copy(self.source)
        resized.source.image_size = image_size
        return resized

    def __call__(self, images: Any, batch_size: int | None = None) -> EncoderOutput:
        """Features of images.

        Args:
            images: PIL images, numpy arrays or tensors of one size; see `to_pixels`.
            batch_size: Images of one forward; None takes all at once.

        Raises:
            ValueError, TypeError: For what are no images, or images the network does not take.
        """
        return self.encode_pixels(to_pixels(images, self.channels), batch_size)

    def encode_pixels(self, pixels: Tensor, batch_size: int | None = None) -> EncoderOutput:
        """Features of `(B, C, H, W)` in [-1, 1], float32.

        Raises:
            ValueError: For another shape or number of channels.
            TypeError: For pixels that are not floating.
        """
        parts = [self._encode(part) for part in self._batches(pixels, batch_size)]
        if len(parts) == 1:
            return parts[0]
        pooled, tokens = (torch.cat([part[name] for part in parts]) for name in ("global", "tokens"))
        return EncoderOutput(pooled, tokens, parts[0].grid)

    @property
    def num_blocks(self) -> int | None:
        """Blocks of the network whose attention `encode_with_attention` can give; None where that is not known."""
        return self.source.num_blocks

    def encode_with_attention(self, pixels: Tensor, layers: Sequence[int]) -> tuple[EncoderOutput, list[Tensor]]:
        """Features, and attention probabilities among the patch tokens of some blocks, in one forward.

        They are recomputed from queries and keys in float32, over the patch tokens alone: each row adds up to 1.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1].
            layers: Block numbers, from 0 or from the end, of a network from `from_pretrained`.

        Returns:
            The features, and for each block `(B, heads, N, N)`.

        Raises:
            TypeError: If the network's attention is not known.
            ValueError: For blocks it does not have, or that lie behind the one which is read.
        """
        (pixels,) = self._batches(pixels, None)
        with self._guard(pixels), self.source.recording_attention(layers) as attention:
            output = self._encode(pixels)
        if len(attention) != len(layers):
            raise ValueError(
                f"Of the blocks {list(layers)} only {len(attention)} are run: features are read before. Choose blocks "
                "up to the encoder's `layer`."
            )
        return output, attention

    def encode_with_gradient(self, pixels: Tensor) -> EncoderOutput:
        """As `encode_pixels`, of one batch, as a graph of the network's parameters.

        The network is in the mode that it is in. For what tunes it; `copy` gives one to tune.

        Raises:
            ValueError, TypeError: As `encode_pixels`.
        """
        (pixels,) = self._batches(pixels, None)
        with torch.enable_grad():
            pooled, tokens, grid = self.source.read_with_gradient(self._prepare(pixels))
            return EncoderOutput(pooled.float(), tokens.float(), grid)

    def copy(self) -> Encoder:
        """The same encoder with a copy of the network, which can be tuned while this one stays as it is."""
        return Encoder(self.source.with_module(copy.deepcopy(self.module)), self.name, self.revision)

    def untrained(self, seed: int = 0) -> Encoder:
        """The same architecture with the random weights that it starts training from: the baseline of training.

        Args:
            seed: Of the weights; torch's global random state is left alone.

        Raises:
            TypeError: For a network without a config whose parts cannot draw their weights again.
        """
        return Encoder(self.source.untrained(seed), f"{self.name} untrained")

    def record(self) -> BaseRecord:
        """What there is to remember of the network; `weights` hashes all tensors as they are."""
        return BaseRecord(
            name=self.name,
            revision=self.revision,
            model_class=type(self.module).__name__,
            dtype=str(self.dtype).removeprefix("torch."),
            weights=weights_hash(self.module),
        )

    def fingerprint(self) -> dict[str, Any]:
        """What decides the features, as JSON values: equal for encoders whose features are the same.

        `weights` hashes the tensors as they are, so an encoder in bfloat16 is another one than in float32.
        """
        record = self.record()
        return {
            "encoder": type(self.source).__name__.removesuffix("Source").lower(),
            "name": record.name,
            "revision": record.revision,
            **self.source.describe(),
            "mean": list(self.source.mean),
            "std": list(self.source.std),
            "dtype": record.dtype,
            "weights": record.weights,
        }

    def __repr__(self) -> str:
        kind = type(self.module).__name__
        return f"Encoder({self.name!r}, {kind}, dim={self.dim}, {self.dtype}, {self.device})"

    def _batches(self, pixels: Tensor, batch_size: int | None) -> Sequence[Tensor]:
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or not len(pixels):
            got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ValueError(f"Pixels are (B, C, H, W) with at least one image; got {got}. Call encoder(images) else.")
        if not pixels.is_floating_point():
            raise TypeError(f"Pixels are floats in [-1, 1]; got {pixels.dtype}. Call encoder(images) for uint8.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        return pixels.split(batch_size or len(pixels))

    def _guard(self, pixels: Tensor) -> Any:
        return _Guard(self.module, self.device.type)

    def _prepare(self, pixels: Tensor) -> Tensor:
        pixels = expand_channels(pixels.to(self.device), self.channels)
        size = self.source.size((pixels.shape[2], pixels.shape[3]))
        return preprocess(pixels, size, self.source.mean, self.source.std)

    def _encode(self, pixels: Tensor) -> EncoderOutput:
        with self._guard(pixels):
            pooled, tokens, grid = self.source.read(self._prepare(pixels))
            return EncoderOutput(pooled.float(), tokens.float(), grid)


class _Guard:
    """Eval mode, no gradients and no autocast inside; all as before after it."""

    def __init__(self, module: nn.Module, device_type: str) -> None:
        self.parts: list[Any] = [torch.no_grad(), torch.autocast(device_type, enabled=False)]
        if any(part.training for part in module.modules()):
            self.parts.append(eval_mode(module))

    def __enter__(self) -> None:
        for part in self.parts:
            part.__enter__()

    def __exit__(self, *error: Any) -> None:
        for part in reversed(self.parts):
            part.__exit__(*error)


__all__ = ["Encoder"]
