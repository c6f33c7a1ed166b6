"""`VectorPriorMixin`: a pipeline's diffusion of vectors, by class or without: the first half of RCG."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_repr.denoiser import sampling
from diffusers_repr.denoiser.prior import GeneratorPrior
from diffusers_repr.models.labels import ClassNamesMixin, Labels, class_or_null_ids


class VectorPriorMixin(sampling.SamplingMixin, ClassNamesMixin):
    """For a pipeline with the components `prior`, a `RepresentationMLPModel`, and `prior_scheduler`; both may be None.

    Between the steps vectors are float32, whatever the dtype of the network.
    """

    prior: Any
    prior_scheduler: Any

    def _need(self, part: Any, what: str) -> Any:
        if part is None:
            raise ValueError(f"This {type(self).__name__} has no {what}; load one and pass it.")
        return part

    @property
    def null_label(self) -> int | None:
        """Id of the prior's null class; None of one without classes or without a null class."""
        config = self._need(self.prior, "prior").config
        return config.num_classes if config.num_classes and config.null_class else None

    @torch.no_grad()
    def sample_representations(
        self: Any,
        batch_size: int | None = None,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 250,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Vectors alone, `(B, D)` float32: of a whole evaluation set at once, for `StoredPrior(..., in_order=True)`.

        Args:
            batch_size: Number of them; as many as labels, latents or generators if None, else 1.
            class_labels: One id or name for all or one each, of a prior with classes; its null class if None.
            guidance_scale: Classifier-free guidance to the classes, `null + guidance_scale (cond - null)` of what the
                network predicts: both are of one x_t and t, so it is the same in eps, x_0 and v. Off up to 1.
            num_inference_steps: Steps of the sampler.
            eta: Noise of DDIM; 1 if None, as RCG has it, of a sampler that takes it.
            generator: One, or one a vector, which makes a vector independent of its batch.
            latents: Standard normal noise `(B, D)` to start from.

        Raises:
            TypeError: For labels that are neither whole numbers nor names, and numbers that are none.
            ValueError: For labels that the prior does not have, guidance without classes, numbers of samples that
                differ, and noise of another shape.
        """
        labels = self._given_labels(class_labels)
        self._check_prior_guidance(guidance_scale, labels)
        count = sampling.count_samples(
            batch_size=batch_size, class_labels=labels, latents=latents, generator=generator
        )
        vectors = self._vectors(count, labels, guidance_scale, num_inference_steps, eta, generator, latents)
        self.maybe_free_model_hooks()
        return vectors

    def as_prior(self, **settings: Any) -> GeneratorPrior:
        """This pipeline's vectors as the `prior` of another pipeline, or of `StoredPrior`.

        Args:
            **settings: Of `sample_representations`, without number and generator.
        """
        self._need(self.prior, "prior")
        return GeneratorPrior(
            lambda count, generator: self.sample_representations(count, generator=generator, **settings)
        )

    def _given_labels(self, class_labels: Labels | None) -> Tensor | None:
        """Ids, of a prior with classes."""
        if class_labels is None:
            return None
        config = self._need(self.prior, "prior, so class_labels do nothing").config
        ids = class_or_null_ids(class_labels, config.num_classes or None, self.get_label_ids)
        if ids is not None and not config.null_class and bool(ids.eq(config.num_classes).any()):
            raise ValueError(f"The prior has the classes 0 to {config.num_classes - 1} and no null class.")
        return ids

    def _check_prior_guidance(self, scale: float, labels: Tensor | None) -> None:
        sampling.check_number("guidance_scale of the prior", scale)
        if scale > 1 and (self.null_label is None or labels is None):
            raise ValueError(
                f"guidance_scale={scale} of the prior guides to classes: it takes class_labels, and a prior with a "
                f"null class (num_classes={self.prior.config.num_classes}, null_class={self.prior.config.null_class})."
            )

    def _vectors(
        self: Any,
        count: int,
        labels: Tensor | None,
        scale: float,
        steps: int,
        eta: float | None,
        generator: Any,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Sampled vectors, `(count, D)`."""
        network, scheduler = self._need(self.prior, "prior"), self.prior_scheduler
        config, device = network.config, torch.device(self._execution_device)
        shape = (count, config.in_channels)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape or not bool(latents.isfinite().all()):
            raise ValueError(f"latents of the prior are finite, {shape}; got {tuple(latents.shape)}.")
        if eta is None:
            eta = 1.0 if "eta" in sampling.accepted_arguments(scheduler) else 0.0
        extra = sampling.step_arguments(scheduler, generator, eta)
        sampling.set_timesteps(scheduler, steps, device)
        latents = latents.to(device).float() * getattr(scheduler, "init_noise_sigma", 1.0)
        inputs = self._label_inputs(labels, count, scale > 1, device)

        def predict(step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
            x = torch.cat([tensors["latents"]] * 2) if scale > 1 else tensors["latents"]
            x = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            timestep = torch.as_tensor(t, device=device).expand(len(x))
            output = network(x.to(network.dtype), timestep, **inputs, return_dict=False)[0].float()
            if scale > 1:
                null, cond = output.chunk(2)
                output = null + scale * (cond - null)
            return {"latents": output}

        samplers, self._interrupt = {"latents": scheduler}, False
        return self._denoise(scheduler.timesteps, {"latents": latents}, predict, samplers, extra, None, ())["latents"]

    def _label_inputs(self, labels: Tensor | None, count: int, guided: bool, device: torch.device) -> dict[str, Any]:
        """The prior's input of classes, null rows first where it is guided."""
        if not self.prior.config.num_classes:
            return {}
        if labels is None:
            if self.null_label is None:
                raise ValueError("The prior has classes and no null class; give class_labels.")
            labels = torch.tensor([self.null_label])
        labels = labels.to(device).expand(count)
        null = torch.full_like(labels, self.prior.config.num_classes)
        return {"class_labels": torch.cat([null, labels]) if guided else labels}


__all__ = ["VectorPriorMixin"]
