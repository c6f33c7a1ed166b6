"""The one object through which a diffusion model is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr import noise as process
from diffusers_repr.denoiser.condition import Condition, eval_mode
from diffusers_repr.denoiser.conditioner import Conditioner, default_conditioner
from diffusers_repr.denoiser.conditioner.inputs import from_embeddings
from diffusers_repr.denoiser.default_layers import LayerDefault, Method
from diffusers_repr.denoiser.family import MAP_INPUT, Family, Grid, floating_dtype
from diffusers_repr.denoiser.family_registry import family_of
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.denoiser.loading import load_pipeline
from diffusers_repr.denoiser.parts import denoiser_parts
from diffusers_repr.denoiser.sizes import ImageSize, check_size, image_sides
from diffusers_repr.denoiser.vae import decode_latents, encode_latents, frame_stride, pixel_channels, vae_stride
from diffusers_repr.denoiser.videos import to_video_pixels
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, Prediction


class Denoiser:
    """A diffusers model with its scheduler, VAE and conditioning, of any family.

    Args:
        model: The network.
        scheduler: Its scheduler; only the training-time noise process is read.
        vae: Autoencoder of a latent model.
        pipe: The pipeline whose code makes text conditions.
        family: Adapter; by the model's class if None.
        schedule: Noise process; read from the scheduler if None.
        conditioner: What the network is conditioned on; as its family tells if None.
        name: Hub id or folder it came from, for recipes.
        revision: Its revision.

    Raises:
        TypeError: If no family adapter fits the model, or no noise process can be read.

    Example:
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> denoiser = Denoiser(unet, DDPMScheduler())
        >>> x_t = denoiser.add_noise(torch.zeros(2, 1, 8, 8), 261, torch.randn(2, 1, 8, 8))
        >>> denoiser.predict(x_t, 261).x0.shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Any = None,
        vae: Any = None,
        *,
        pipe: Any = None,
        family: Family | None = None,
        schedule: NoiseSchedule | None = None,
        conditioner: Conditioner | None = None,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        if schedule is None and scheduler is None:
            of_pipe = " Of a pipeline: Denoiser.from_pipe(pipe)." if hasattr(model, "components") else ""
            raise TypeError(f"Denoiser needs a scheduler, or a NoiseSchedule(...) by `schedule=`.{of_pipe}")
        self.model, self.scheduler, self.vae, self.pipe = model, scheduler, vae, pipe
        self.family = family_of(model) if family is None else family.bound_to(self.config)
        self.schedule = schedule or NoiseSchedule.from_scheduler(scheduler)
        self.conditioner = conditioner
        self.name, self.revision = name, revision
        self.prompts: MutableMapping[Any, dict[str, Any]] | None = None  # set a dict to keep encoded prompts

    @classmethod
    def from_pipe(cls, pipe: Any, **kwargs: Any) -> Denoiser:
        """From a loaded pipeline; its components are shared, not copied.

        A pipeline that has a `conditioner` tells what its network is conditioned on.

        Raises:
            TypeError: If it is no pipeline, or no component of it is a denoiser we know.
            ValueError: If the pipeline has two networks, one for high and one for low noise.
        """
        model, scheduler, vae = denoiser_parts(pipe)
        place = pipe.config.get("_name_or_path")
        kwargs.setdefault("name", None if place is None else str(place))
        told = getattr(pipe, "conditioner", None)
        if isinstance(told, Conditioner):
            kwargs.setdefault("conditioner", told)
        return cls(model, scheduler, vae, pipe=pipe, **kwargs)

    @classmethod
    def from_pretrained(cls, id_or_folder: str | Path, *, revision: str | None = None, **kwargs: Any) -> Denoiser:
        """Load a pipeline folder or Hub id with diffusers and wrap it.

        Args:
            id_or_folder: Local folder with a `model_index.json`, or Hub id.
            revision: Branch, tag or commit on the Hub.
            **kwargs: For `DiffusionPipeline.from_pretrained` (`dtype`, `variant`, `token`, ...). With
                `trust_remote_code=True` code of the repository may run.

        Raises:
            FileNotFoundError: If the folder is no pipeline folder.
            ValueError: If the name is neither a folder nor a Hub id, a file of it is damaged, or names code that is
                neither of diffusers nor of this package.
            OSError: If the Hub cannot be reached or has no such repository, or a component cannot be read.
        """
        pipe = load_pipeline(id_or_folder, revision, kwargs)
        return cls.from_pipe(pipe, name=str(id_or_folder), revision=revision)

    # What it is

    @property
    def conditioner(self) -> Conditioner:
        """What the network is conditioned on: for training, sampling and guidance alike. May be set."""
        # Bound anew: one that was kept would hold this object, and with it the weights, in a circle.
        return (self._conditioner or default_conditioner(self.family)).bound_to(self)

    @conditioner.setter
    def conditioner(self, conditioner: Conditioner | None) -> None:
        """Another one; None: that of the family."""
        if conditioner is not None and not isinstance(conditioner, Conditioner):
            raise TypeError(f"A Conditioner is needed; got {type(conditioner).__name__}.")
        self._conditioner = conditioner

    @property
    def config(self) -> Mapping[str, Any]:
        """The network's config; empty for a plain nn.Module."""
        return getattr(plain_module(self.model), "config", {})

    @property
    def device(self) -> torch.device:
        """Where inputs go: the execution device under offload, else the model's."""
        if self.pipe is not None:
            # Private, and what every pipeline of diffusers goes by: under offload the public `device` is the CPU.
            return torch.device(self.pipe._execution_device)
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The network's floating dtype."""
        return floating_dtype(self.model)

    @property
    def stride(self) -> int:
        """Pixels per x_0 pixel along one side: 1 without a VAE."""
        return 1 if self.vae is None else vae_stride(self.vae)

    @property
    def frame_stride(self) -> int:
        """Frames of a video per frame of x_0, behind the first: 1 without a VAE."""
        return 1 if self.vae is None else frame_stride(self.vae.config)

    @property
    def multiple(self) -> int:
        """Image height and width must be multiples of this, in pixels."""
        return self.stride * self.family.multiple()

    @property
    def image_channels(self) -> int:
        """Channels of an image: those of x_0 for pixel models, those of the VAE's input else."""
        if self.vae is not None:
            return pixel_channels(self.vae.config)
        return self.family.channels() - self.conditioner.map_channels

    @property
    def image_size(self) -> tuple[int, int]:
        """The image size (H, W), of one frame of a video, that the network was configured for."""
        h, w = self.family.size()
        return h * self.stride, w * self.stride

    def token_grid(self, path: str, tokens: int, size: tuple[int, ...]) -> Grid | None:
        """Where the image lies in a sequence of `tokens` that the layer at `path` gives, for x_0 of `size` (H, W).

        Of a video the size is (frames, H, W).

        Returns:
            `((h, w), start)` as `Family.grid`; None if the layer or the sequence is no image.
        """
        return self.family.grid(tokens, size) if self.family.is_image(path) else None

    def default_layers(self, method: Method) -> LayerDefault:
        """Layers that a method takes in this network unless told otherwise; see `Family.default_layers`."""
        return self.family.default_layers(method, self.model)

    def feature_map(self, path: str, value: Tensor, size: tuple[int, ...]) -> FeatureMap:
        """What the layer at `path` gave for x_0 of `size` (H, W) or (frames, H, W), differentiably.

        Args:
            path: Full module path.
            value: A map `(B, C, h, w)` or tokens `(B, N, C)`.
            size: Of x_0; of x_t, which is as large.

        Raises:
            ValueError: If it is no image.
        """
        if value.ndim == 2 + len(size):
            return FeatureMap.from_map(value, len(size))
        place = self.token_grid(path, value.shape[1], size) if value.ndim == 3 else None
        if place is None:
            raise ValueError(
                f"Layer {path!r} gave {tuple(value.shape)} for x_0 of {' x '.join(map(str, size))}, which is no image "
                "of maps or tokens. `list_layers(denoiser)` shows the layers that are."
            )
        return FeatureMap(value, *place)

    # Images and latents

    def resize_to(self, image_size: ImageSize = None) -> tuple[int, int] | None:
        """The size (H, W) to which images are brought that are asked for in `image_size`; None: they keep theirs.

        Args:
            image_size: (H, W) or one side, in pixels; None for the size that the model was configured for (a model
                whose config tells none takes images as they are); `"keep"` for the images' own.

        Raises:
            ValueError: For anything else, and for sizes that do not suit the model.
        """
        if image_size == "keep":
            return None
        size = self._own_size() if image_size is None else image_sides(image_size)
        if size is not None:
            self.check_size(size)
        return size

    def _own_size(self) -> tuple[int, int] | None:
        try:
            return self.image_size
        except ValueError:  # the config does not tell
            return None

    def pixels(self, images: Any, image_size: ImageSize = None) -> Tensor:
        """Images to `(B, C, H, W)` float32 in [-1, 1]; for a network of videos, videos to `(B, C, frames, H, W)`.

        Args:
            images: See `to_pixels`; of videos `to_video_pixels`, to which an image is a video of one frame.
            image_size: See `resize_to`. The whole image is stretched to it, the aspect ratio is not kept.
        """
        convert = to_video_pixels if self.family.axes == 3 else to_pixels
        return convert(images, self.image_channels, self.resize_to(image_size))

    def latent_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Size of x_0 for images of `size` (H, W), or videos of (frames, H, W), in pixels.

        For a network of videos (H, W) means one frame.
        """
        *frames, h, w = size
        if self.family.axes == 3:
            frames = [(count - 1) // self.frame_stride + 1 for count in frames] or [1]
        return *frames, h // self.stride, w // self.stride

    def check_size(self, size: tuple[int, ...]) -> None:
        """Raise ValueError unless images of `size` (H, W), or videos of (frames, H, W), in pixels suit the model."""
        family = self.family
        frames, square, name = self.frame_stride, family.square(), type(self.model).__name__
        check_size(name, size, axes=family.axes, multiple=self.multiple, frame_stride=frames, square=square)

    def encode(
        self,
        images: Any,
        *,
        image_size: ImageSize = None,
        sample: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Images to x_0 `(B, C, h, w)`, videos to `(B, C, f, h, w)`, in the network's dtype, on its device.

        Args:
            images: See `pixels`.
            image_size: See `resize_to`: the model's own size if None, `"keep"` for the images'.
            sample: Latent models: draw from the VAE's posterior instead of taking its mean.
            generator: For `sample`: one, or one per image.
        """
        return self.encode_pixels(self.pixels(images, image_size), sample=sample, generator=generator)

    def encode_pixels(
        self, pixels: Tensor, *, sample: bool = False, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> Tensor:
        """As `encode`, from `(B, C, H, W)` in [-1, 1], or `(B, C, frames, H, W)`; an image is a video's one frame."""
        self.check_size(tuple(pixels.shape[2:]))
        pixels = pixels.to(self.device)
        if pixels.ndim == 4 and self.family.axes == 3:
            pixels = pixels.unsqueeze(2)
        if self.vae is not None:
            pixels = encode_latents(self.vae, pixels, sample, generator)
        return pixels.to(self.device, self.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        """x_0 to images `(B, C, H, W)` float32 in [0, 1], to videos `(B, frames, C, H, W)`."""
        pixels = x0 if self.vae is None else decode_latents(self.vae, x0)
        pixels = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    # Noise

    def level(self, level: NoiseLevel | float | Tensor) -> NoiseLevel:
        """Resolve a level (a bare number is a timestep; larger is noisier) for this model."""
        return self.schedule.resolve(level)

    def add_noise(self, x0: Tensor, level: NoiseLevel | float | Tensor, noise: Tensor) -> Tensor:
        """`alpha x_0 + sigma eps` at `level`; see `diffusers_repr.noise.add_noise`."""
        return process.add_noise(x0, self.level(level), noise)

    # Conditions

    def condition(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | None = None,
        class_labels: int | Sequence[int] | Tensor | None = None,
        values: Any = None,
        embeddings: Mapping[str, Any] | None = None,
        batch: int | None = None,
        size: tuple[int, ...] | None = None,
        cache: MutableMapping[Any, dict[str, Any]] | None = None,
    ) -> Condition:
        """What the network takes besides the input and the timestep, for `batch` samples.

        Text models run their pipeline's own call to its first denoiser call; every distinct prompt is encoded once.

        Args:
            prompt: One prompt for all or one per sample. None is the empty prompt.
            negative_prompt: Also make the null condition, from this prompt.
            class_labels: An id for all or one per sample. None is the null class where the model has one.
            values: Vectors, tokens or maps of a `conditioner` that takes such, one row for all or one per sample. None
                is its null condition.
            embeddings: Ready inputs instead: by the names of the pipeline's call (`prompt_embeds`, ...) or of the
                network's forward (`encoder_hidden_states`, ...), with 1 or `batch` rows.
            batch: Number of samples; as many as there are prompts, labels or rows if None.
            size: Image size (H, W) in pixels, of a video (frames, H, W); the configured size if None.
            cache: Keeps encoded prompts between calls, as does `prompts` of this object.

        Raises:
            ValueError: For inputs the family does not take, or a wrong number of them.
            TypeError: For prompts that are no strings and labels that are no whole numbers.
        """
        if size is not None:
            self.check_size(size)  # some pipelines round the size with a mere warning
            size = (1, *size) if len(size) < self.family.axes else size
        if embeddings is not None:
            if not (prompt is None and negative_prompt is None and class_labels is None and values is None):
                raise ValueError("Pass embeddings, or prompt / class_labels / values, not both.")
            return from_embeddings(self, embeddings, batch, size)
        conditioner = self.conditioner
        given = {"prompt": prompt or None, "class_labels": class_labels, "values": values}
        conditioner.refuse(**given, negative_prompt=negative_prompt or None)
        chosen = prompt if conditioner.argument == "prompt" else given[conditioner.argument]
        return conditioner.condition(chosen, batch, size, cache, negative_prompt)

    # The network

    def network_inputs(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword inputs of the network's forward for `x_t` at a resolved level."""
        if MAP_INPUT not in condition:
            return self.family.inputs(x_t, level, condition)
        others = {name: value for name, value in condition.items() if name != MAP_INPUT}
        return self.family.with_condition(self.family.inputs(x_t, level, others), {MAP_INPUT: condition[MAP_INPUT]})

    def predict(
        self, x_t: Tensor, level: NoiseLevel | float | Tensor, condition: Condition | Mapping[str, Any] | None = None
    ) -> Prediction:
        """Run the network once.

        Args:
            x_t: `alpha x_0 + sigma eps`, `(B, C, h, w)` or `(B, C, f, h, w)`: what the network takes.
            level: Noise level, one for all or one per sample.
            condition: From `condition(...)`, or network inputs by name; None is the default condition.
        """
        level = self.level(level)
        if condition is None:
            *frames, h, w = x_t.shape[2:]
            frames = [(count - 1) * self.frame_stride + 1 for count in frames]
            condition = self.condition(batch=x_t.shape[0], size=(*frames, h * self.stride, w * self.stride))
        inputs = condition.kwargs() if isinstance(condition, Condition) else condition
        raw = self.model(**self.network_inputs(x_t, level, inputs))
        return Prediction(self.family.output(raw, x_t), x_t, level, self.schedule)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode for the network inside; every module's own mode comes back after."""
        with eval_mode(self.model):
            yield

    def __repr__(self) -> str:
        parameters = sum(p.numel() for p in self.model.parameters())
        condition = self.family.conditioning if self._conditioner is None else type(self._conditioner).__name__
        if condition == "class" and not self.family.classes()[0]:
            condition = "none" if self.family.vector_input() is None else "vector"
        return (
            f"Denoiser({type(self.model).__name__}, {parameters:,} parameters, {self.dtype}, {self.device}, "
            f"name={self.name!r},\n"
            f"    image_size={self._own_size()}, condition={condition!r}, noise={self.schedule.kind!r}, "
            f"predicts={self.schedule.output!r})"
        )


__all__ = ["Denoiser"]
