"""One network that classifies images, samples them and turns one class into another. Needs `diffusers-repr`.

`JointDiffusionPipeline.from_pretrained(X)` without remote code, or `DiffusionPipeline.from_pretrained(X,
custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is a folder or Hub id that
`examples/train_joint.py` or `JointDiffusionPipeline.save_pretrained` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers loads a component of a class that is imported already, and imports none because a folder names it.
from diffusers_repr.schedulers_ext import scheduling_flow_match_ode, scheduling_flow_match_sde  # noqa: F401
from torch import Tensor

from diffusers_repr.capture.unet_halves import encode_partial
from diffusers_repr.denoiser import Denoiser, sampling
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.family_registry import family_of
from diffusers_repr.guidance import EnergyGuidance, guide
from diffusers_repr.guidance.activations import NORMALIZATIONS, Steering, steer
from diffusers_repr.heads.joint import JointHead, check_joint_parts
from diffusers_repr.hub.own_pipelines import OwnComponentsMixin
from diffusers_repr.models.joint_vit import JointViTModel
from diffusers_repr.models.labels import Labels, class_ids
from diffusers_repr.noise import NoiseSchedule, sampler_level
from diffusers_repr.objectives.joint.jdm import clean_inputs


@dataclass
class JointClassificationOutput(BaseOutput):
    """What `classify` returns.

    Attributes:
        logits: `(B, K)`, float32, on the CPU.
        probabilities: Their softmax.
        class_labels: The likeliest class ids, int64 `(B,)`.
        names: Their names.
    """

    logits: Tensor
    probabilities: Tensor
    class_labels: Tensor
    names: list[str]


class JointDiffusionPipeline(sampling.SamplingMixin, OwnComponentsMixin, DiffusionPipeline):
    """Classifies, samples and edits with one network, which its own classifier guides.

    JDM (Deja et al. 2023, arXiv 2301.13622): a `UNet2DModel` without classes and a `JointHead` on its encoder, which
    guides by moving the activations along the gradient of the cross-entropy. HybViT (Yang et al. 2022, arXiv
    2208.07791): a `JointViTModel` with its classifier inside; guidance is the gradient of log p(class) in x_t.
    Between the steps the sample is float32, or float64 if `latents` are, whatever the dtype of the network.

    Args:
        unet: The network.
        scheduler: Its sampler, any that the noise process allows.
        classifier: The head of a U-Net; None for a `JointViTModel`.

    Raises:
        TypeError: For a network that is neither, and a classifier that is no `JointHead`.
        ValueError: For a U-Net with classes or without a head, and a `JointViTModel` with one.
    """

    model_cpu_offload_seq = "unet"
    _optional_components = ["classifier"]
    # It runs amid the network's forward, which must not be sent away for it.
    _exclude_from_cpu_offload = ["classifier"]
    _callback_tensor_inputs = ["latents", "class_labels"]
    _guidance_scale = 0.0

    def __init__(
        self,
        unet: UNet2DModel | JointViTModel,
        scheduler: SchedulerMixin,
        classifier: JointHead | None = None,
    ) -> None:
        super().__init__()
        check_joint_parts(unet, classifier)
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)

    @property
    def labels(self) -> list[str]:
        """Name of each class, in the order of the ids; the ids as text where none are known."""
        return self._classifier.labels

    @property
    def _classifier(self) -> JointHead | JointViTModel:
        return self.unet if self.classifier is None else self.classifier

    # Classification

    @torch.no_grad()
    def classify(self, images: Any, image_size: int | tuple[int, int] | None = None) -> JointClassificationOutput:
        """Class probabilities of clean images.

        Args:
            images: PIL images, arrays or tensors, floats in [0, 1], as `diffusers_repr.denoiser.images.to_pixels`
                takes them.
            image_size: Resize to (H, W), or to a square. None takes images of the network's own size only, the one
                that its classifier has learned.

        Raises:
            TypeError: For what is no image.
            ValueError: For images that do not fit the network, and a `JointViTModel` without classes.
        """
        if not self.labels:
            raise ValueError(f"This {type(self.unet).__name__} has no classes (num_classes=0): it samples only.")
        denoiser = Denoiser.from_pipe(self)
        x0 = self._encode(denoiser, images, image_size)
        parts = [part for part in (self.unet, self.classifier) if part is not None]
        with eval_mode(*parts):
            if self.classifier is None:
                logits = self.unet(x0).logits
            else:
                logits = self.classifier.classify(encode_partial(self.unet, **clean_inputs(denoiser, x0)))
        self.maybe_free_model_hooks()
        logits = logits.float().cpu()
        found = logits.argmax(1)
        return JointClassificationOutput(
            logits, logits.softmax(1), found, [self.labels[place] for place in found.tolist()]
        )

    # Sampling

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        latents: Tensor | None = None,
        guidance_normalization: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples, guided to classes where these are given.

        Args:
            batch_size: Number of samples; as many as there are labels or latents if None, else 1.
            class_labels: One id or name for all samples, or one a sample.
            guidance_scale: How strongly to the classes, away from them below 0; needed where labels are given. 0 is
                bit-equal to no guidance. Of a U-Net: `h + scale d CE / d h` for all activations h, where 10 to 100
                is usual for a classifier of noisy images; of a `JointViTModel`: `eps - scale sigma d log p / d x_t`.
            num_inference_steps: 1 or more; 1000 for a `DDPMScheduler` and 50 for others if None.
            generator: One, or one a sample.
            eta: Noise of DDIM, from 0 to 1. Other schedulers take none but 0.
            use_clipped_model_output: As in `DDIMPipeline`: re-derive eps from the clipped x_0.
            latents: Standard normal noise `(B, C, H, W)` to start from, in place of drawing it.
            guidance_normalization: Of a U-Net: `none` (the default, the paper's), `sigma` (scale times the noise
                level's sigma) or `relative` (scale is the share of a sample's activations that they move by; try
                0.6).
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`: what the sampler gave.
            return_dict: False returns a tuple.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; tensors that it
                returns by name take the place of these.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `latents`, `class_labels`.
            num_images_per_label: Samples of each of the class_labels, side by side.

        Returns:
            `.images`; with `return_dict=False` a tuple of them.

        Raises:
            TypeError: For labels that are no ids and no names, and numbers that are none.
            ValueError: For labels that the classifier does not have, numbers of samples that differ, numbers outside
                of their ranges, latents that do not fit or are not finite, settings that this model or scheduler does
                not act on, and a scheduler made from the config of another noise process.
        """
        sampling.check_output_type(output_type)
        labels, scale = class_ids(class_labels, self.labels), self._scale(class_labels, guidance_scale)
        (labels,) = sampling.repeat_rows(num_images_per_label, class_labels=labels)
        count = sampling.count_samples(
            batch_size=batch_size, class_labels=labels, latents=latents, generator=generator
        )
        noise = self._noise(count, generator, latents)
        self._set_timesteps(num_inference_steps, noise.device)
        noise = noise * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return self._run(
            noise,
            self.scheduler.timesteps,
            labels,
            scale,
            generator,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
            guidance_normalization=guidance_normalization,
            output_type=output_type,
            return_dict=return_dict,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    @torch.no_grad()
    def counterfactual(
        self,
        images: Any,
        class_labels: Labels,
        strength: float = 0.5,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """The images as they might look if they were of another class: noised, and denoised under guidance.

        Args:
            images: As `classify` takes them.
            class_labels: The other class: one id or name for all, or one for each image.
            strength: Share of the steps that are taken, above 0 and up to 1: how much of an image may change.
            guidance_scale: How strongly to it, as in the call.
            num_inference_steps: Of the whole schedule, 1 or more; as in the call if None.
            generator: One, or one an image.
            image_size: As of `classify`.
            **settings: `eta`, `use_clipped_model_output`, `guidance_normalization`, `output_type`, `return_dict` and
                the callback, as in the call.

        Returns:
            As the call.

        Raises:
            TypeError: As the call.
            ValueError: As the call and `classify`, and for a strength that leaves no step.
        """
        strength = sampling.check_number("strength", strength, 0, 1, above=True)
        labels, scale = class_ids(class_labels, self.labels), self._scale(class_labels, guidance_scale)
        x0 = self._encode(Denoiser.from_pipe(self), images, image_size).float()
        sampling.count_samples(batch_size=len(x0), class_labels=labels, generator=generator)
        self._set_timesteps(num_inference_steps, x0.device)
        every, order = self.scheduler.timesteps, getattr(self.scheduler, "order", 1)
        count = -(-len(every) // order)  # of two network calls a step the last step has one
        taken = min(int(strength * count), count)
        if not taken:
            raise ValueError(
                f"strength={strength} of {count} steps takes none; here it lies from {1 / count:.3g} to 1."
            )
        start_at = order * (count - taken)
        timesteps = every[start_at:]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start_at)
        noise = randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        first = timesteps[:1].expand(len(x0))
        if hasattr(self.scheduler, "add_noise"):
            start = self.scheduler.add_noise(x0, noise, first)
        else:  # flow matching
            start = self.scheduler.scale_noise(x0, first, noise)
        return self._run(start, timesteps, labels, scale, generator, **settings)

    def _run(
        self,
        latents: Tensor,
        timesteps: Tensor,
        labels: Tensor | None,
        scale: float,
        generator: Any,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        guidance_normalization: str | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """The sampler's loop, from `latents` over `timesteps`."""
        sampling.check_output_type(output_type)
        known = self._callback_tensor_inputs
        names = sampling.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        extra = sampling.step_arguments(self.scheduler, generator, eta, use_clipped_model_output)
        labels = None if labels is None else labels.to(latents.device).expand(len(latents))
        self._guidance_scale, self._interrupt, self._num_timesteps = scale, False, len(timesteps)
        schedule = NoiseSchedule.from_scheduler(self.scheduler)
        tensors: dict[str, Any] = {"latents": latents, "class_labels": labels}
        with ExitStack() as guidance:
            steering = guidance.enter_context(self._guided(labels, scale, guidance_normalization))

            def predict(step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
                nonlocal labels, scale, steering
                if self._guidance_scale != scale or tensors["class_labels"] is not labels:  # by a callback
                    guidance.close()
                    labels, scale = tensors["class_labels"], self._guidance_scale
                    steering = guidance.enter_context(self._guided(labels, scale, guidance_normalization))
                if steering is not None and guidance_normalization == "sigma":
                    steering.scale = scale * sampler_level(self.scheduler, t, schedule).level.sigma
                return {"latents": self._predict(tensors["latents"], t)}

            samplers = {"latents": self.scheduler}
            tensors = self._denoise(timesteps, tensors, predict, samplers, extra, callback_on_step_end, names)
        images = sampling.pack_images(tensors["latents"], output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(self, latents: Tensor, t: Tensor) -> Tensor:
        """What the scheduler steps with."""
        x = self.scheduler.scale_model_input(latents, t) if hasattr(self.scheduler, "scale_model_input") else latents
        output = self.unet(x.to(self.unet.dtype), t.expand(len(x)), return_dict=False)[0]
        return output.to(latents.dtype)

    @contextmanager
    def _guided(self, labels: Tensor | None, scale: float, normalization: str | None) -> Iterator[Steering | None]:
        """Guidance of the network in the block."""
        kinds = (*NORMALIZATIONS, "sigma")
        if normalization is not None and (normalization not in kinds or self.classifier is None):
            own = f"it is one of {', '.join(kinds)}" if self.classifier is not None else "a JointViTModel has none"
            raise ValueError(f"guidance_normalization={normalization!r}; {own}.")
        if not scale or labels is None:
            yield None
        elif self.classifier is None:
            with guide(self, EnergyGuidance(_surprise(labels), layers=("classifier",), scale=scale)):
                yield None
        else:
            kind = "relative" if normalization == "relative" else "none"
            with steer(self.unet, self.classifier, labels, scale, kind) as steering:
                yield steering

    # Arguments

    def _scale(self, class_labels: Labels | None, scale: float | None) -> float:
        """The guidance's, 0 for none."""
        if scale is None:
            if class_labels is not None:
                raise ValueError(
                    "class_labels act through guidance, for the network itself takes none: pass guidance_scale= too "
                    "(0 is off)."
                )
            return 0.0
        sampling.check_number("guidance_scale", scale)
        if scale and class_labels is None:
            raise ValueError(f"guidance_scale={scale} guides towards classes: pass class_labels.")
        return float(scale)

    def _set_timesteps(self, count: int | None, device: Any) -> None:
        if count is None:
            count = 1000 if isinstance(self.scheduler, DDPMScheduler) else 50
        sampling.set_timesteps(self.scheduler, count, device)

    def _encode(self, denoiser: Denoiser, images: Any, image_size: int | tuple[int, int] | None) -> Tensor:
        """Images as the network takes them; without `image_size` they are of its own size."""
        x0 = denoiser.encode(images, image_size="keep" if image_size is None else image_size)
        found, own = tuple(x0.shape[2:]), denoiser.image_size
        if image_size is None and found != own:
            raise ValueError(
                f"The images are {found[0]} x {found[1]} (H x W), and this {type(self.unet).__name__} has learned "
                f"{own[0]} x {own[1]}. Pass image_size={own} to resize them, or image_size={found} to take them as "
                "they are, if the network does."
            )
        return x0

    def _noise(self, count: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Standard normal noise `(B, C, H, W)`, in the network's dtype drawn and float32 or wider kept."""
        config, device, dtype = self.unet.config, self._execution_device, self.unet.dtype
        if latents is None:
            shape = (count, config.in_channels, *family_of(self.unet).size())
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        else:
            fixed = family_of(self.unet).size() if self.classifier is None else None  # a JointViTModel's
            sampling.check_latents(latents, config.in_channels, fixed, family_of(self.unet).multiple())
        return latents.to(device, torch.promote_types(latents.dtype, torch.float32))


def _surprise(labels: Tensor) -> Callable[..., Tensor]:
    """The energy `-log p(class)`, `(B,)`, of the logits that the network gives beside its prediction."""

    def energy(features: Mapping[str, Tensor], x0: Tensor | None, condition: Mapping[str, Any]) -> Tensor:
        logits = features["classifier"].log_softmax(1)
        return -logits.gather(1, labels.to(logits.device)[:, None])[:, 0]

    return energy
