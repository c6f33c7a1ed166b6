"""DDPM and DDIM models, of classes and layouts too, with `guidance=[...]`. Needs `pip install diffusers-repr`.

`DiffusionPipeline.from_pretrained(X, custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is
a folder or Hub id of a `DDPMPipeline` or `DDIMPipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor

# diffusers loads a component of a class that is imported already, and imports none because a folder names it.
from diffusers_repr.schedulers_ext import scheduling_flow_match_ode, scheduling_flow_match_sde  # noqa: F401
from torch import Tensor

from diffusers_repr.denoiser import LayoutConditioner, sampling
from diffusers_repr.denoiser.conditioner import bare_conditioner
from diffusers_repr.denoiser.family import MAP_INPUT
from diffusers_repr.denoiser.family_registry import family_of
from diffusers_repr.denoiser.prior import Prior
from diffusers_repr.guidance import Guidance
from diffusers_repr.guidance.pipeline import GuidedPipelineMixin
from diffusers_repr.hub.own_pipelines import OwnComponentsMixin

LabelIds = int | Sequence[int] | Tensor


class GuidedUnconditionalPipeline(GuidedPipelineMixin, sampling.SamplingMixin, OwnComponentsMixin, DiffusionPipeline):
    """Samples a `UNet2DModel`, with or without classes, with any scheduler that steps from the network's output.

    Without guidance it is bit-equal to `DDPMPipeline` and `DDIMPipeline`. A class-conditional model has its null class
    last: classes 0 to N - 1 and the null id N, `num_class_embeds = N + 1`. Without labels, and as the other half of
    classifier-free guidance, it is given the null id. A model of layouts (`LayoutConditioner`) has more input channels
    than it predicts; its null condition is no layout. `guidance_stats` tells what the newest guided call cost.

    Args:
        unet: The network.
        scheduler: Its sampler, kept as it is saved.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "class_labels", "layout"]

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def _folder_class(self) -> str:
        # With another sampler the stock pipelines would sample wrongly, so the folder is of this class then.
        # By name: a scheduler that is being guided has a class of its own.
        if self._takes_layouts:
            return type(self).__name__
        stock = {"DDPMScheduler": "DDPMPipeline", "DDIMScheduler": "DDIMPipeline"}
        return stock.get(type(self.scheduler).__name__, type(self).__name__)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network is called with null and conditional rows, in this order."""
        return self._guidance_scale > 1 and (self._takes_layouts or self.null_label is not None)

    @property
    def _takes_layouts(self) -> bool:
        return family_of(self.unet).map_channels() > 0

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
        class_labels: LabelIds | None = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        guidance: Guidance | Sequence[Guidance] | None = None,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        prior: Prior | None = None,
        layout: Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples.

        Args:
            batch_size: Number of samples; as many as there are labels, layouts or latents if None, else 1.
            generator: One, or one a sample.
            num_inference_steps: 1 or more; 1000 for a `DDPMScheduler` and 50 for others if None, as in the stock
                pipelines.
            eta: Noise of DDIM, from 0 to 1. Other schedulers take none but 0.
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
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `latents`, `class_labels`, `layout`.
            num_images_per_label: Samples of each of the class_labels or layouts, side by side.
            prior: Draws the class_labels, or the layouts of a model of these, by the generator, after the noise, where
                they are not given; `stored_prior` if None.
            layout: Class ids of pixels `(B, H, W)`, or `(H, W)` for all, of any size; 255 is no class. None of a model
                of layouts is the null condition.

        Returns:
            `.images`; with `return_dict=False` a tuple of them.

        Raises:
            TypeError: For labels and numbers that are none, and what is no guidance.
            ValueError: For labels that the model does not have, numbers of samples that differ, numbers outside of
                their ranges, latents that do not fit or are not finite, settings that this model or scheduler does
                not act on, and a scheduler made from the config of another noise process.
        """
        prior = self.drawing(prior, class_labels, layout)
        self._check(output_type, guidance_scale, class_labels, layout, prior)
        known = self._callback_tensor_inputs
        names = sampling.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        extra = sampling.step_arguments(self.scheduler, generator, eta, use_clipped_model_output)
        layouts, rows = self._layout_rows(layout), None
        if prior is None and not self._takes_layouts:
            rows = self._class_rows(class_labels)
        given = None if class_labels is None else rows
        repeated, layouts = sampling.repeat_rows(num_images_per_label, class_labels=given, layout=layouts)
        rows = rows if repeated is None else repeated
        batch_size = sampling.count_samples(
            batch_size=batch_size, class_labels=rows, layout=layouts, latents=latents, generator=generator
        )
        noise = self._noise(batch_size, generator, latents)
        if prior is not None:
            drawn = prior.draw(batch_size, generator)
            rows, layouts = (
                (None, self._layout_rows(drawn)) if self._takes_layouts else (self._class_rows(drawn), None)
            )
        rows, layouts = (
            None if given is None else given.expand(batch_size, *given.shape[1:]) for given in (rows, layouts)
        )
        self._guidance_scale, self._interrupt = guidance_scale, False
        if num_inference_steps is None:
            num_inference_steps = 1000 if isinstance(self.scheduler, DDPMScheduler) else 50

        with self.guided(guidance):
            self._num_timesteps = sampling.set_timesteps(self.scheduler, num_inference_steps, noise.device)
            noise = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
            tensors: dict[str, Any] = {"latents": noise, "class_labels": rows, "layout": layouts}
            steps, samplers = self.scheduler.timesteps, {"latents": self.scheduler}
            tensors = self._denoise(steps, tensors, self._predict, samplers, extra, callback_on_step_end, names)

        images = sampling.pack_images(tensors["latents"], output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(
        self, output_type: str, scale: float, class_labels: LabelIds | None, layout: Any, prior: Prior | None
    ) -> None:
        sampling.check_output_type(output_type)
        sampling.check_number("guidance_scale", scale)
        config, name = self.unet.config, type(self.unet).__name__
        if scale > 1 and self.null_label is None and not self._takes_layouts:
            raise ValueError(
                f"guidance_scale={scale} needs a null class, which this {name} lacks "
                f"(num_class_embeds={config.num_class_embeds}, class_embed_type={config.class_embed_type!r}). Leave "
                "it at 1; other guidance needs no classes: guidance=[PAG(3.0)]."
            )
        given, other = ("layout", "class_labels") if self._takes_layouts else ("class_labels", "layout")
        if {"layout": layout, "class_labels": class_labels}[other] is not None:
            raise ValueError(f"This {name} takes no {other}; pass {given}.")
        value, what = (layout, "layouts") if self._takes_layouts else (class_labels, "classes")
        if value is not None and prior is not None:
            raise ValueError(f"prior draws {given} that are not given; pass one of both.")
        if scale > 1 and value is None and prior is None:
            raise ValueError(f"guidance_scale={scale} guides towards {what}: pass {given} or a prior.")

    def _layout_rows(self, layout: Any) -> Tensor | None:
        """Layouts `(B, H, W)` on the device."""
        if layout is None:
            return None
        rows = torch.as_tensor(layout)
        rows = rows[None] if rows.ndim == 2 else rows
        bare_conditioner(self.unet).check(rows)
        return rows.to(self._execution_device, torch.long)

    def _class_rows(self, class_labels: LabelIds | None) -> Tensor | None:
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
        inputs = family_of(self.unet).from_class_labels(labels)
        return inputs["class_labels"].to(self._execution_device) if inputs else None

    def _noise(self, batch_size: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Noise to start from, `(B, C, H, W)`, before the scheduler's scale."""
        family, device, dtype = family_of(self.unet), self._execution_device, self.unet.dtype
        channels = family.channels() - family.map_channels()
        if latents is None:
            shape = (batch_size, channels, *family.size())
            return randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        sampling.check_latents(latents, channels, multiple=family.multiple())
        return latents.to(device, dtype)

    def _predict(self, step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
        """What the scheduler steps with, classifier-free guidance included."""
        latents, channels = tensors["latents"], tensors["latents"].shape[1]
        guided = self.do_classifier_free_guidance
        x = torch.cat([latents] * 2) if guided else latents
        if hasattr(self.scheduler, "scale_model_input"):
            x = self.scheduler.scale_model_input(x, t)
        x, class_labels = self._conditioned(x, tensors["class_labels"], tensors["layout"], guided)
        output = self.unet(x, t, class_labels=class_labels, return_dict=False)[0]
        if guided:
            null, cond = output[:, :channels].chunk(2)
            combined = null + self.guidance_scale * (cond - null)
            output = torch.cat([combined, output[len(latents) :, channels:]], 1)
        return {"latents": sampling.without_variance(self.scheduler, output, channels)}

    def _conditioned(
        self, x: Tensor, class_labels: Tensor | None, layout: Tensor | None, guided: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The network's input with its maps, and its class_labels; the first half is null where it guides."""
        if not self._takes_layouts:
            if guided and class_labels is not None:
                both = torch.cat([class_labels] * 2)
                class_labels = bare_conditioner(self.unet).inputs(both, _first_half(x))["class_labels"]
            return x, class_labels
        if layout is None:
            layout = torch.full((len(x), *x.shape[2:]), -1, device=x.device)
        elif guided:
            layout = torch.cat([layout] * 2)
        conditioner = bare_conditioner(self.unet, LayoutConditioner(size=(x.shape[2], x.shape[3])))
        inputs = conditioner.inputs(layout, _first_half(x) if guided else None)
        return torch.cat([x, inputs[MAP_INPUT].to(x)], 1), inputs["class_labels"]


def _first_half(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) < len(x) // 2
