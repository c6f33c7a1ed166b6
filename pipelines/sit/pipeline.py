"""Images from a SiT or U-ViT by class, by a vector or freely, guided inside an interval. Needs `diffusers-repr`.

`SiTPipeline.from_pretrained(X)` without remote code, or `DiffusionPipeline.from_pretrained(X, custom_pipeline=<this
folder or its Hub id>, trust_remote_code=True)`, where X is a folder or Hub id that a training script or
`SiTPipeline.save_pretrained` wrote.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers loads a component of a class that is imported already, and imports none because a folder names it.
from diffusers_repr.schedulers_ext import scheduling_flow_match_ode, scheduling_flow_match_sde  # noqa: F401
from torch import Tensor

from diffusers_repr.denoiser import LabelConditioner, MapConditioner, VectorConditioner, sampling
from diffusers_repr.denoiser.conditioner import bare_conditioner
from diffusers_repr.denoiser.conditioner.tensors import given_vectors
from diffusers_repr.denoiser.family import MAP_INPUT
from diffusers_repr.denoiser.prior import HistogramPrior, Prior
from diffusers_repr.denoiser.sizes import asked_latent_size
from diffusers_repr.denoiser.vae import decode_latents, vae_stride
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.own_pipelines import OwnComponentsMixin
from diffusers_repr.models.class_token import ClassTokenHead
from diffusers_repr.models.labels import ClassNamesMixin, Labels, class_or_null_ids
from diffusers_repr.models.sit import SiTTransformer2DModel
from diffusers_repr.models.uvit import UViTTransformer2DModel

# Timesteps are float32: 1000 t of a grid point may stand this far (in t) from where the grid has it.
_SLACK = 1e-6


@dataclass
class SiTPipelineOutput(BaseOutput):
    """What `SiTPipeline` returns.

    Attributes:
        images: PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`.
        class_labels: int64 `(B,)`, also those that were drawn; None of a model without classes.
        class_tokens: The class tokens that were denoised with the images, `(B, D)`; None of a model without.
    """

    images: Any
    class_labels: Tensor | None = None
    class_tokens: Tensor | None = None


class SiTPipeline(sampling.SamplingMixin, ClassNamesMixin, OwnComponentsMixin, DiffusionPipeline):
    """Samples a `SiTTransformer2DModel` (arXiv 2401.08740) or a `UViTTransformer2DModel` (arXiv 2209.12152).

    In latent or pixel space. Any scheduler of the model's process does: `FlowMatchODEScheduler` (Euler, Heun) and
    `FlowMatchSDEScheduler` of this package and diffusers' `FlowMatchEulerDiscreteScheduler` for networks that predict
    the velocity, DDIM, DDPM and their kin for networks of noise, as a converted DiT or U-ViT; a learned variance is
    split off where the scheduler does not read it. Between the steps the sample is float32, or float64 if `latents`
    are, whatever the dtype of the network.

    Args:
        transformer: The network.
        scheduler: Its sampler.
        vae: Decodes the samples; None of a model that works on pixels in [-1, 1].
        id2label: Class id -> name, or several names with commas between: `class_labels` may then be names.
        class_token: Of a network trained by REG (arXiv 2507.01467): a class token is denoised together with the image,
            by the same scheduler and inside the same interval of guidance. None: the network was trained without.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae", "class_token"]
    _exclude_from_cpu_offload = ["class_token"]  # small, and called by its parts
    _callback_tensor_inputs = ["latents", "class_labels", "condition", "class_token"]
    _guides_now = False

    def __init__(
        self,
        transformer: SiTTransformer2DModel | UViTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: Mapping[Any, str] | None = None,
        class_token: ClassTokenHead | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, class_token=class_token)
        self.register_class_names(id2label)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers'; warns of a folder that keeps a class token's head where no pipeline takes it from.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As in diffusers.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if pipe.class_token is None and Path(pretrained_model_name_or_path, "heads", "class-token").is_dir():
            warnings.warn(
                f"{str(pretrained_model_name_or_path)!r} was trained by an earlier form of REG, whose class token no "
                "pipeline holds: samples without it are not what was trained. Train it anew.",
                stacklevel=2,
            )
        return pipe

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network is now called with null and conditional rows, in this order."""
        return self._guides_now

    @property
    def null_label(self) -> int | None:
        """Id of the null class; None for a model without classes."""
        return self.transformer.config.num_classes or None

    @property
    def map_channels(self) -> int:
        """Input channels of the network that are no x_t, but a map it is conditioned on."""
        return max(0, self.transformer.config.in_channels - self.transformer.out_channels)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        condition: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_channels: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        prior: Prior | None = None,
        class_token_guidance_scale: float | None = None,
    ) -> SiTPipelineOutput | tuple[Any]:
        """Samples.

        Args:
            class_labels: One id or name for all samples, or one a sample; the id `num_classes` is the null class.
                None: drawn by the generator, after the noise, as `prior` says; none for a model without classes.
            batch_size: Number of samples; as many as there are labels, latents, conditions or generators if None,
                else 1.
            guidance_scale: Classifier-free guidance, `null + guidance_scale (cond - null)`; off up to 1.
            guidance_interval: `(low, high)` in t = timestep / num_train_timesteps, both included: where guidance acts
                (arXiv 2404.07724). Outside, the network is called with the conditional rows alone. Both halves of a
                step of Heun's method are as its start. A negative `high` switches guidance off.
            num_inference_steps: Steps of the scheduler, 1 or more.
            generator: One, or one a sample, which makes a sample independent of its batch.
            latents: Standard normal noise `(B, C, h, w)` to start from, in place of drawing it.
            condition: Vectors `(B, condition_dim)`, or one for all; None is the null vector. Of a network with C more
                input channels than it predicts maps `(B, C, h, w)` of the latents' size; None is zeros.
            height: Of the images, in pixels; that of training if None.
            width: As `height`.
            guidance_channels: Guide the first channels only, the others are conditional (the code of DiT guides 3 of
                4); None guides all.
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`: what the sampler gave.
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; tensors that it
                returns by name take the place of these.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `latents`, `class_labels`, `condition`,
                `class_token`.
            num_images_per_label: Samples of each of the class_labels or conditions, side by side.
            prior: Draws the class_labels, or the conditions if it gives vectors, that are not given; `stored_prior` if
                None, and without one class_labels are drawn from all alike.
            class_token_guidance_scale: Guidance of the class token, of a model of REG (`--cls-cfg-scale` of its code);
                1 leaves the token conditional. It acts where `guidance_scale` does, which it equals if None.

        Returns:
            `.images`, `.class_labels` and `.class_tokens`.

        Raises:
            TypeError: For labels that are neither whole numbers nor names, and numbers that are none.
            ValueError: For labels and conditions that the model does not have, shapes and numbers of samples that do
                not fit, numbers outside of their ranges, latents that are not finite, guidance that could not act,
                and a scheduler made from the config of another noise process.
        """
        prior = self.drawing(prior, class_labels, condition)
        self._check(output_type, guidance_scale, guidance_interval, guidance_channels)
        self._check_token_scale(class_token_guidance_scale, guidance_scale)
        known = self._callback_tensor_inputs
        names = sampling.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        labels, vectors = self._given_labels(class_labels), self._given_condition(condition)
        self._check_guided_condition(guidance_scale, class_labels, labels, vectors, prior)
        labels, vectors = sampling.repeat_rows(num_images_per_label, class_labels=labels, condition=vectors)
        batch_size = sampling.count_samples(
            batch_size=batch_size, class_labels=labels, condition=vectors, latents=latents, generator=generator
        )
        noise = self._noise(batch_size, generator, latents, height, width)
        labels, vectors = self._drawn(prior, batch_size, generator, labels, vectors)
        labels, vectors = (
            None if rows is None else rows.to(noise.device).expand(batch_size, *rows.shape[1:])
            for rows in (labels, vectors)
        )
        token = self._token_noise(batch_size, generator, noise)
        tensors: dict[str, Any] = {"class_labels": labels, "condition": vectors, "class_token": token}
        extra = sampling.step_arguments(self.scheduler, generator)

        with self._guiding(guidance_scale):
            tokens = noise.shape[2] * noise.shape[3] // self.transformer.config.patch_size**2
            self._num_timesteps = sampling.set_timesteps(self.scheduler, num_inference_steps, noise.device, tokens)
            inside = self._inside(guidance_interval)
            tensors["latents"] = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
            samplers = {"latents": self.scheduler}
            if token is not None:
                samplers["class_token"] = copy.deepcopy(self.scheduler)  # a state of its own

            def predict(step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
                if getattr(self.scheduler, "state_in_first_order", True):
                    self._guides_now = inside[step] and self.guidance_scale > 1
                own = self.guidance_scale if class_token_guidance_scale is None else class_token_guidance_scale
                return self._predict(t, guidance_channels=guidance_channels, token_scale=own, **tensors)

            steps = self.scheduler.timesteps
            tensors = self._denoise(steps, tensors, predict, samplers, extra, callback_on_step_end, names)

        images = self._images(tensors["latents"], output_type)
        self.maybe_free_model_hooks()
        output = SiTPipelineOutput(images=images, class_labels=labels, class_tokens=tensors["class_token"])
        return output if return_dict else (images,)

    @contextmanager
    def _guiding(self, scale: float) -> Iterator[None]:
        """The state of a call, which a callback may change; nothing guides after it."""
        self._guidance_scale, self._guides_now, self._interrupt = scale, False, False
        try:
            yield
        finally:
            self._guides_now = False

    def _check(self, output_type: str, scale: float, interval: Any, channels: int | None) -> None:
        sampling.check_output_type(output_type)
        sampling.check_number("guidance_scale", scale)
        if not isinstance(interval, (tuple, list)) or len(interval) != 2 or any(math.isnan(end) for end in interval):
            raise ValueError(f"guidance_interval is (low, high) in t, 0 the data and 1 the noise; got {interval!r}.")
        if interval[0] > interval[1] >= 0:
            raise ValueError(f"guidance_interval={tuple(interval)} is the wrong way round: give (low, high).")
        if channels is not None:
            check_whole("guidance_channels", channels, 1, self._channels)
        config = self.transformer.config
        if scale > 1 and self.null_label is None and config.condition_dim is None and not self.map_channels:
            raise ValueError(
                f"guidance_scale={scale} needs a model with classes or a vector condition; this "
                f"{type(self.transformer).__name__} has neither (num_classes=0, condition_dim=None). Leave it at 1."
            )

    def _check_token_scale(self, token_scale: float | None, scale: float) -> None:
        if token_scale is None:
            return
        if self.class_token is None:
            raise ValueError(
                "class_token_guidance_scale guides a class token, and this pipeline has none; leave it out."
            )
        sampling.check_number("class_token_guidance_scale", token_scale, 0, above=True)
        if scale <= 1:
            raise ValueError(
                f"class_token_guidance_scale={token_scale} acts where guidance_scale does, and that is {scale}; give "
                "it more than 1, or leave both."
            )

    def _drawn(
        self, prior: Prior | None, count: int, generator: Any, labels: Tensor | None, vectors: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels and vectors, those that were not given drawn."""
        values = None if prior is None else prior.draw(count, generator)
        if values is not None and (labels if not values.is_floating_point() else vectors) is not None:
            raise ValueError("prior draws what is not given; pass it, or class_labels (or condition), not both.")
        if values is not None and values.is_floating_point():
            vectors = self._given_condition(values)
        elif values is not None:
            labels = self._given_labels(values)
        if labels is None and self.null_label is not None:
            labels = HistogramPrior.uniform(self.null_label).draw(count, generator)
        return labels, vectors

    def _check_guided_condition(
        self, scale: float, given: Any, labels: Tensor | None, vectors: Tensor | None, prior: Prior | None
    ) -> None:
        """Guidance between two null conditions would change nothing."""
        if scale <= 1 or vectors is not None or (prior is not None and labels is None):
            return
        drawn = self.null_label is not None and given is None
        if not drawn and (labels is None or bool(labels.eq(self.null_label or 0).all())):
            raise ValueError(
                f"guidance_scale={scale} guides towards a condition, and there is none: pass class_labels below "
                f"{self.null_label}, or condition."
            )

    def _inside(self, interval: tuple[float, float]) -> list[bool]:
        """For each network call whether guidance acts at it."""
        low, high = interval
        steps = self.scheduler.config.get("num_train_timesteps", 1000)
        times = (self.scheduler.timesteps.cpu().double() / steps).tolist()
        inside = [low - _SLACK <= t <= high + _SLACK for t in times]
        if self.guidance_scale > 1 and high >= 0 and not any(inside):
            raise ValueError(
                f"guidance_interval={tuple(interval)} holds none of the {len(times)} steps, t = {times[0]:.4g} to "
                f"{times[-1]:.4g}, so guidance would not act. Widen it, or set guidance_scale=1."
            )
        return inside

    def _given_labels(self, class_labels: Labels | None) -> Tensor | None:
        return class_or_null_ids(class_labels, self.null_label, self.get_label_ids)

    def _given_condition(self, condition: Tensor | None) -> Tensor | None:
        if not self.map_channels:
            return given_vectors(condition, self.transformer.config.condition_dim)
        if condition is not None:
            self._bound().check(condition)
        return condition

    def _bound(self) -> Any:
        """How the network takes vectors or maps."""
        kind = MapConditioner(self.map_channels) if self.map_channels else VectorConditioner()
        return bare_conditioner(self.transformer, kind)

    @property
    def _channels(self) -> int:
        """Of x_t."""
        return self.transformer.config.in_channels - self.map_channels

    def _noise(
        self, batch_size: int, generator: Any, latents: Tensor | None, height: int | None, width: int | None
    ) -> Tensor:
        """Noise to start from, `(B, C, h, w)`, float32 or wider."""
        config, device = self.transformer.config, self._execution_device
        stride = 1 if self.vae is None else vae_stride(self.vae)
        trained = config.sample_size
        trained = (trained, trained) if isinstance(trained, int) else tuple(trained)
        if latents is not None:
            sampling.check_latents(latents, self._channels)
            trained = tuple(latents.shape[2:])
        size = asked_latent_size(height, width, trained, stride, config.patch_size, given=latents is not None)
        if latents is not None:
            return latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        shape = (batch_size, self._channels, *size)
        return randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)

    def _token_noise(self, batch_size: int, generator: Any, like: Tensor) -> Tensor | None:
        """Noise of the class tokens, `(B, D)`; None of a model without."""
        if self.class_token is None:
            return None
        shape = (batch_size, self.class_token.config.token_dim)
        return randn_tensor(shape, generator=generator, device=like.device, dtype=torch.float32).to(like.dtype)

    def _predict(
        self,
        t: Tensor,
        latents: Tensor,
        class_labels: Tensor | None,
        condition: Tensor | None,
        class_token: Tensor | None,
        guidance_channels: int | None,
        token_scale: float,
    ) -> dict[str, Tensor]:
        """What image and class token are stepped with, classifier-free guidance included, in the sample's dtype."""
        guided, batch, channels = self.do_classifier_free_guidance, len(latents), latents.shape[1]
        x = torch.cat([latents] * 2) if guided else latents
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, t)
        dropped = torch.arange(len(x), device=x.device) < len(x) - batch
        # In training mode the network otherwise drops labels at random.
        inputs: dict[str, Any] = {"drop_mask": torch.zeros_like(dropped)} if self.transformer.training else {}
        if condition is None and self.map_channels:
            condition = latents.new_zeros(batch, self.map_channels, *latents.shape[2:])
        labelled = bare_conditioner(self.transformer, LabelConditioner())
        for values, bound in ((class_labels, labelled), (condition, self._bound())):
            if values is not None:
                values = torch.cat([values] * 2) if guided else values
                inputs |= bound.inputs(values, dropped if guided else None)
        if MAP_INPUT in inputs:
            x = torch.cat([x, inputs.pop(MAP_INPUT).to(x)], dim=1)
        timestep = torch.as_tensor(t, device=x.device).expand(len(x))
        if class_token is not None:
            inputs["class_token"] = self.class_token.enter(torch.cat([class_token] * 2) if guided else class_token)
        output, *state = self.transformer(x.to(self.transformer.dtype), timestep, **inputs, return_dict=False)
        output = output.to(latents.dtype)
        turn = self.class_token.leave(state[0]).to(latents.dtype) if state else None
        if guided and turn is not None:
            null, cond = turn.chunk(2)
            turn = null + token_scale * (cond - null)
        if guided:
            n = channels if guidance_channels is None else guidance_channels
            null, cond = output.chunk(2)
            combined = null[:, :n] + self.guidance_scale * (cond[:, :n] - null[:, :n])
            output = torch.cat([combined, cond[:, n:]], 1)
        outputs = {"latents": sampling.without_variance(self.scheduler, output, channels)}
        return outputs if turn is None else {**outputs, "class_token": turn}

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = latents if self.vae is None else decode_latents(self.vae, latents)
        return sampling.pack_images(images.float(), output_type)
