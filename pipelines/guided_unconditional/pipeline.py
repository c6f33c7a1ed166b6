"""DDPM and DDIM models, class-conditional ones too, with `guidance=[...]`. Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
a folder or Hub id of a `DDPMPipeline` or `DDIMPipeline`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_repr.denoiser.family import family_of
from diffusers_repr.guidance import Guidance
from diffusers_repr.guidance.base import check_finite
from diffusers_repr.guidance.pipeline import GuidedPipelineMixin

Labels = int | Sequence[int] | Tensor


class GuidedUnconditionalPipeline(GuidedPipelineMixin, DiffusionPipeline):
    """Samples a `UNet2DModel`, with or without classes, with any scheduler that steps from the network's output.

    Without guidance it is bit-equal to `DDPMPipeline` and `DDIMPipeline`. A class-conditional model has its null class
    last: classes 0 to N - 1 and the null id N, `num_class_embeds = N + 1`. Without labels, and as the other half of
    classifier-free guidance, it is given the null id. `guidance_stats` tells what the newest guided call cost.

    Args:
        unet: The network.
        scheduler: Its sampler, kept as it is saved.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "class_labels"]
    _guidance_scale = 1.0
    _interrupt = False

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def _folder_class(self) -> str:
        # With another sampler the stock pipelines would sample wrongly, so the folder is of this class then.
        # By name: a scheduler that is being guided has a class of its own.
        stock = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}
        return stock.get(type(self.scheduler).__name__, type(self).__name__)

    @property
    def guidance_scale(self) -> float:
        """Of the newest call; a callback may change it by `pipe._guidance_scale = ...`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network is called with null and conditional rows, in this order."""
        return self._guidance_scale > 1 and self.null_label is not None

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the steps is left out: a callback may set `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def null_label(self) -> int | None:
        """Id of the null class; None for a model without a table of classes."""
        count, kind = self.unet.config.num_class_embeds, self.unet.config.class_embed_type
        return None if count is None or kind is not None else count - 1

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance: Guidance | Sequence[Guidance] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples.

        Args:
            batch_size: Number of samples; as many as there are labels or latents if None, else 1.
            generator: One, or one a sample.
            num_inference_steps: 1000 for a `DDPMScheduler` and 50 for others if None, as in the stock pipelines.
            eta: Noise of DDIM, from 0 to 1.
            use_clipped_model_output: As in `DDIMPipeline`.
            class_labels: One id for all samples or one a sample (vectors for `class_embed_type="identity"`); the null
                class if None.
            guidance_scale: Classifier-free guidance, `null + guidance_scale (cond - null)`; off up to 1.
            latents: Standard normal noise `(B, C, H, W)` to start from, in place of drawing it; of any size that the
                network takes.
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`: what the sampler gave.
            return_dict: False returns a tuple.
            guidance: As `diffusers_repr.guide` takes it: `[PAG(3.0), SAG(0.75)]`.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; tensors that it
                returns by name take the place of these.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `latents`, `class_labels`.

        Returns:
            `.images`; with `return_dict=False` a tuple of them.

        Raises:
            TypeError: For labels that are no whole numbers, and what is no guidance.
            ValueError: For labels that the model does not have, numbers of samples that differ, settings that this
                model or scheduler does not act on.
        """
        self._check(output_type, guidance_scale, class_labels)
        names = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"Callbacks get tensors of {self._callback_tensor_inputs}; asked for {unknown}.")
        extra = self._step_arguments(eta, use_clipped_model_output, generator)
        rows = self._class_rows(class_labels)
        batch_size = _count(batch_size, rows, latents, generator)
        rows = None if rows is None else rows.expand(batch_size, *rows.shape[1:])
        noise = self._noise(batch_size, generator, latents)
        self._guidance_scale, self._interrupt = guidance_scale, False
        if num_inference_steps is None:
            num_inference_steps = 1000 if isinstance(self.scheduler, DDPMScheduler) else 50

        with self.guided(guidance):
            self.scheduler.set_timesteps(num_inference_steps, device=noise.device)
            noise = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
            tensors: dict[str, Any] = {"latents": noise, "class_labels": rows}
            for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
                if self.interrupt:
                    continue
                output = self._predict(tensors["latents"], t, tensors["class_labels"])
                stepped = self.scheduler.step(output, t, tensors["latents"], return_dict=False, **extra)[0]
                tensors["latents"] = stepped.to(self.unet.dtype)
                if callback_on_step_end is not None:
                    given = {name: tensors[name] for name in names}
                    tensors |= callback_on_step_end(self, step, t, given) or {}

        images = tensors["latents"]
        if output_type != "latent":
            images = (images / 2 + 0.5).clamp(0, 1)
        if output_type in ("np", "pil"):
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, output_type: str, guidance_scale: float, class_labels: Labels | None) -> None:
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type is 'pil', 'np', 'pt' or 'latent'; got {output_type!r}.")
        check_finite("guidance_scale", guidance_scale)
        if guidance_scale > 1 and self.null_label is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs a null class, which this {type(self.unet).__name__} lacks "
                f"(num_class_embeds={self.unet.config.num_class_embeds}, "
                f"class_embed_type={self.unet.config.class_embed_type!r}). Leave it at 1; other guidance needs no "
                "classes: guidance=[PAG(3.0)]."
            )
        if guidance_scale > 1 and class_labels is None:
            raise ValueError(f"guidance_scale={guidance_scale} guides towards classes: pass class_labels.")

    def _step_arguments(self, eta: float, clipped: bool | None, generator: Any) -> dict[str, Any]:
        """Those arguments that this scheduler's step takes."""
        accepted = inspect.signature(self.scheduler.step).parameters
        given = {"eta": eta or None, "use_clipped_model_output": clipped}
        for name, value in given.items():
            if value is not None and name not in accepted:
                raise ValueError(f"{type(self.scheduler).__name__} does not take {name}, got {value}; leave it out.")
        arguments = {name: value for name, value in given.items() if value is not None}
        return arguments | ({"generator": generator} if "generator" in accepted else {})

    def _class_rows(self, class_labels: Labels | None) -> Tensor | None:
        """Labels on the device, as many as were given, the null id for none; None for a model without classes."""
        given = self.null_label if class_labels is None else class_labels
        table, labels = self.unet.config.class_embed_type is None, None
        if given is not None:
            try:
                labels = torch.as_tensor(given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"class_labels are whole numbers, one or one a sample; got {given!r}.") from error
            if table and (labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1):
                raise TypeError(f"class_labels are whole numbers, one or one a sample; got {given!r}.")
            labels = labels.reshape(1) if labels.ndim == 0 else labels
            labels = labels.long() if table else labels.to(self.unet.dtype)
        inputs = family_of(self.unet).from_class_labels(self.unet.config, labels)
        return inputs["class_labels"].to(self._execution_device) if inputs else None

    def _noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Noise to start from, `(B, C, H, W)`, before the scheduler's scale."""
        config, device, dtype = self.unet.config, self._execution_device, self.unet.dtype
        if latents is None:
            shape = (batch_size, config.in_channels, *family_of(self.unet).size(config))
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if latents.ndim != 4 or latents.shape[1] != config.in_channels:
            raise ValueError(f"latents are (B, {config.in_channels}, H, W); got {tuple(latents.shape)}.")
        return latents.to(device, dtype)

    def _predict(self, latents: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """What the scheduler steps with, classifier-free guidance included."""
        guided, null_label, channels = self.do_classifier_free_guidance, self.null_label, latents.shape[1]
        x = torch.cat([latents] * 2) if guided else latents
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, t)
        if guided and class_labels is not None and null_label is not None:
            class_labels = torch.cat([torch.full_like(class_labels, null_label), class_labels])
        output = self.unet(x, t, class_labels=class_labels, return_dict=False)[0]
        if guided:
            null, cond = output[:, :channels].chunk(2)
            combined = null + self.guidance_scale * (cond - null)
            output = torch.cat([combined, output[len(latents) :, channels:]], 1)
        # Only this scheduler reads a learned variance, and only where its config says so.
        learned = str(self.scheduler.config.get("variance_type", "")).startswith("learned")
        return output if learned and isinstance(self.scheduler, DDPMScheduler) else output[:, :channels]


def _count(batch_size: int | None, labels: Tensor | None, latents: Tensor | None, generator: Any) -> int:
    """Number of samples, on which all that is given one a sample must agree."""
    counts = {
        "batch_size": batch_size,
        "class_labels": None if labels is None or len(labels) == 1 else len(labels),
        "latents": None if latents is None else len(latents),
        "generator": len(generator) if isinstance(generator, (list, tuple)) else None,
    }
    told = {name: count for name, count in counts.items() if count is not None}
    if len(set(told.values())) > 1 or min(told.values(), default=1) < 1:
        raise ValueError(f"How many samples? {', '.join(f'{name}: {count}' for name, count in told.items())}.")
    return next(iter(told.values()), 1)
