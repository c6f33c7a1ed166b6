"""Images by way of a representation: a vector is drawn by diffusion, then an image given it. Needs `diffusers-repr`.

`RCGPipeline.from_pretrained(X)` without remote code, or `DiffusionPipeline.from_pretrained(X, custom_pipeline=<this
folder or its Hub id>, trust_remote_code=True)`, where X is a folder or Hub id that
`examples/train_representation.py` or `RCGPipeline.save_pretrained` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers loads a component of a class that is imported already, and imports none because a folder names it.
from diffusers_repr.schedulers_ext import scheduling_flow_match_ode, scheduling_flow_match_sde  # noqa: F401
from torch import Tensor

from diffusers_repr.denoiser import VectorConditioner, sampling
from diffusers_repr.denoiser.conditioner import bare_conditioner
from diffusers_repr.denoiser.conditioner.tensors import TOKENS, given_vectors
from diffusers_repr.denoiser.family_registry import family_of
from diffusers_repr.denoiser.prior import Prior
from diffusers_repr.denoiser.vae import decode_latents
from diffusers_repr.denoiser.vector_sampling import VectorPriorMixin
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.own_pipelines import OwnComponentsMixin, named_pipeline
from diffusers_repr.models.labels import Labels
from diffusers_repr.models.masked_token_model import MaskedTokenModel
from diffusers_repr.models.maskgit_vq import MaskGITVQModel
from diffusers_repr.models.representation_mlp import RepresentationMLPModel
from diffusers_repr.models.sit import SiTTransformer2DModel
from diffusers_repr.models.uvit import UViTTransformer2DModel
from diffusers_repr.models.vector_embedding import VectorEmbedding


@dataclass
class RCGPipelineOutput(BaseOutput):
    """What `RCGPipeline` returns.

    Attributes:
        images: PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`.
        condition: The vectors they were made from, `(B, D)`, float32.
        class_labels: int64 `(B,)`, of the vectors; None where none were given.
    """

    images: Any
    condition: Tensor | None = None
    class_labels: Tensor | None = None


class RCGPipeline(VectorPriorMixin, OwnComponentsMixin, DiffusionPipeline):
    """Representation-conditioned generation (RCG, Li et al. 2023, arXiv 2312.03701), without labels or by class.

    `prior` draws a vector by DDIM with eta = 1; a network of pixels or latents makes an image given it: a
    `UNet2DModel` with `class_embed_type="identity"`, a `UNet2DConditionModel`, to which it is one token, or a
    transformer with a vector input, such as `SiTTransformer2DModel(condition_dim=D)`; or MAGE's network of tokens,
    `MaskedTokenModel(condition_dim=D)`, which needs no scheduler. A pipeline may have one half alone. Between the
    steps vectors and samples are float32, or float64 if `latents` are, whatever the dtype of the networks.

    Args:
        prior: Denoises vectors.
        prior_scheduler: Its sampler; what the network predicts is in its `prediction_type`.
        unet: Denoises images or latents; or
        transformer: likewise, or one of tokens.
        scheduler: Its sampler.
        vae: Decodes latents, or is the tokenizer of a network of tokens; None of a model of pixels in [-1, 1].
        condition_embedding: Brings vectors to the width of a U-Net's input, with the null vector of its guidance.
        id2label: Of a prior with classes: id -> name, or several names with commas between.

    Raises:
        ValueError: For both `unet` and `transformer`, a network without its sampler, one that takes no vectors, and
            widths that differ.
    """

    model_cpu_offload_seq = "prior->condition_embedding->unet->transformer->vae"
    _optional_components = [
        "prior", "prior_scheduler", "unet", "transformer", "scheduler", "vae", "condition_embedding",
    ]  # fmt: skip
    _callback_tensor_inputs = ["latents", "condition", "class_labels"]

    def __init__(
        self,
        prior: RepresentationMLPModel | None = None,
        prior_scheduler: SchedulerMixin | None = None,
        unet: UNet2DModel | UNet2DConditionModel | None = None,
        transformer: SiTTransformer2DModel | UViTTransformer2DModel | MaskedTokenModel | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: AutoencoderKL | VQModel | MaskGITVQModel | None = None,
        condition_embedding: VectorEmbedding | None = None,
        id2label: Mapping[Any, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            prior=prior,
            prior_scheduler=prior_scheduler,
            unet=unet,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            condition_embedding=condition_embedding,
        )
        self.register_class_names(id2label)
        self._check_parts()

    def _check_parts(self) -> None:
        for network, sampler in (("prior", "prior_scheduler"), ("unet", "scheduler"), ("transformer", "scheduler")):
            if getattr(self, network) is not None and getattr(self, sampler) is None and not self._of_tokens(network):
                raise ValueError(f"{network} is there without its {sampler}; pass both.")
        if self.unet is not None and self.transformer is not None:
            raise ValueError("Both unet and transformer are given; one network makes the images.")
        if self._network is None:
            return
        if self._of_tokens():
            self._token_pipeline()  # refuses a tokenizer that does not fit
        width = self._takes()[0]
        if self.prior is not None and width != self.prior.config.in_channels:
            drawn, name = self.prior.config.in_channels, type(self._network).__name__
            raise ValueError(
                f"The prior draws vectors of {drawn} channels, and {name} takes {width}; a VectorEmbedding({drawn}, "
                f"{width}) that was trained with it brings them there: condition_embedding=."
            )

    @property
    def _network(self) -> Any:
        """What makes the images; None of a pipeline of vectors alone."""
        return self.unet if self.unet is not None else self.transformer

    def _of_tokens(self, name: str = "transformer") -> bool:
        """Whether a component is a network of tokens, which are decoded in parallel, without noise or scheduler."""
        return isinstance(getattr(self, name), MaskedTokenModel)

    def _token_pipeline(self) -> Any:
        """What makes images of such a network; by its name, for a pipeline's file knows no second pipeline."""
        return named_pipeline("TokenGenerationPipeline")(self.vae, self.transformer)

    def _takes(self) -> tuple[int, bool]:
        """Width of the vectors that the network of images takes, and whether it has a null vector."""
        if self._of_tokens():
            width = self.transformer.config.condition_dim
            if not width:
                raise ValueError("This MaskedTokenModel takes no vectors (condition_dim=0); train one that does.")
            return int(width), True
        bound = self._bound()
        width = bound.channels()
        assert width is not None
        return width, bound.has_null

    @property
    def conditioner(self) -> VectorConditioner:
        """What the network of images is conditioned on: vectors.

        Raises:
            ValueError: If it takes none, or there is no network.
        """
        network = self._need(self._network, "network of images (unet or transformer)")
        family = family_of(network)
        name = TOKENS if isinstance(network, UNet2DConditionModel) else family.vector_input()
        if name is None:
            raise ValueError(
                f"This {type(network).__name__} takes no vectors. Those that do: UNet2DModel(class_embed_type="
                '"identity"), UNet2DConditionModel, SiTTransformer2DModel(condition_dim=D).'
            )
        return VectorConditioner(name, embedding=self.condition_embedding)

    def _bound(self) -> VectorConditioner:
        conditioner = self.conditioner  # refuses a missing network
        return cast(VectorConditioner, bare_conditioner(self._network, conditioner))

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network of images is called with null and conditional rows, in this order."""
        return self._guidance_scale > 1

    # Images

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        condition: Tensor | None = None,
        prior: Prior | None = None,
        prior_guidance_scale: float = 1.0,
        prior_num_inference_steps: int = 250,
        prior_eta: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        num_images_per_label: int = 1,
        temperature: float | None = None,
    ) -> RCGPipelineOutput | tuple[Any]:
        """Samples.

        Args:
            batch_size: Number of samples; as many as there are labels, vectors, latents or generators if None, else 1.
            class_labels: One id or name for all or one a sample, of a prior with classes; its null class if None.
            guidance_scale: Classifier-free guidance of the image to its vector, `null + guidance_scale (cond - null)`;
                off up to 1.
            num_inference_steps: Steps of the image's sampler, 1 or more.
            generator: One, or one a sample, which makes a sample independent of its batch.
            eta: Noise of DDIM for the image, from 0 to 1. Other schedulers take none but 0.
            latents: Standard normal noise `(B, C, h, w)` to start the image from, in place of drawing it.
            condition: Vectors `(B, D)`, or one for all, in place of drawing them: those of images, for example.
            prior: Draws the vectors instead, after the noise: `StoredPrior(vectors, in_order=True)`; of a pipeline
                without a network for them `stored_prior` if None.
            prior_guidance_scale: As `guidance_scale` of `sample_representations`.
            prior_num_inference_steps: Steps of the vectors' sampler.
            prior_eta: As `eta` of `sample_representations`.
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`: what the sampler gave.
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step of the image;
                tensors that it returns by name take the place of these.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `latents`, `condition`, `class_labels`.
            num_images_per_label: Samples of each of the class_labels or vectors, side by side.
            temperature: Of a network of tokens, as of `TokenGenerationPipeline`, whose default None is; so are
                the callback's tensors, and what `num_inference_steps` and `guidance_scale` do.

        Returns:
            `.images`, `.condition` and `.class_labels`.

        Raises:
            TypeError: For labels that are neither whole numbers nor names, and numbers that are none.
            ValueError: For labels and vectors that the networks do not take, numbers of samples that differ, numbers
                outside of their ranges, latents that do not fit or are not finite, guidance that could not act, and a
                missing half of the pipeline.
        """
        if self.prior is None:
            prior = self.drawing(prior, condition, class_labels)
        given = sum(value is not None for value in (condition, prior, class_labels))
        labels, vectors = self._check(output_type, guidance_scale, class_labels, condition, given)
        of_tokens = self._of_tokens()
        self._check_kind(temperature, latents, eta)
        names = callback_on_step_end_tensor_inputs  # those of tokens are checked where they are
        if not of_tokens:
            names = sampling.callback_names(callback_on_step_end, names, self._callback_tensor_inputs)
        extra = {} if of_tokens else sampling.step_arguments(self.scheduler, generator, eta)
        if condition is None and prior is None:
            self._check_prior_guidance(prior_guidance_scale, labels)
        labels, vectors = sampling.repeat_rows(num_images_per_label, class_labels=labels, condition=vectors)
        count = sampling.count_samples(
            batch_size=batch_size, class_labels=labels, condition=vectors, latents=latents, generator=generator
        )
        device = torch.device(self._execution_device)
        noise = torch.zeros((), device=device) if of_tokens else self._noise(count, generator, latents)
        if prior is not None:
            vectors = given_vectors(prior.draw(count, generator), self._takes()[0])
        elif vectors is None:
            draws = (prior_guidance_scale, prior_num_inference_steps, prior_eta, generator)
            vectors = self._vectors(count, labels, *draws)
        assert vectors is not None
        tensors: dict[str, Any] = {
            "latents": noise,
            "condition": vectors.to(noise.device, torch.float32).expand(count, -1),
            "class_labels": None if labels is None else labels.to(noise.device).expand(count),
        }
        self._guidance_scale, self._interrupt = guidance_scale, False
        if of_tokens:
            settings: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
            if callback_on_step_end is not None:
                settings |= {"callback_on_step_end": callback_on_step_end, "callback_on_step_end_tensor_inputs": names}
            steps = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **settings}
            images = self._token_images(tensors["condition"], generator, output_type, steps)
            return self._packed(images, tensors, return_dict)
        self._num_timesteps = sampling.set_timesteps(self.scheduler, num_inference_steps, noise.device)
        tensors["latents"] = noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        samplers, steps = {"latents": self.scheduler}, self.scheduler.timesteps
        predict = self._predictor()
        tensors = self._denoise(steps, tensors, predict, samplers, extra, callback_on_step_end, names)
        images = self._images(tensors["latents"], output_type)
        return self._packed(images, tensors, return_dict)

    def _packed(self, images: Any, tensors: dict[str, Any], return_dict: bool) -> RCGPipelineOutput | tuple[Any]:
        """What a call gives."""
        self.maybe_free_model_hooks()
        return (
            (images,) if not return_dict else RCGPipelineOutput(images, tensors["condition"], tensors["class_labels"])
        )

    def _check_kind(self, temperature: float | None, latents: Tensor | None, eta: float) -> None:
        """Refuse what the other kind of generator takes."""
        if self._of_tokens() and (latents is not None or eta):
            raise ValueError("A network of tokens starts from masks, not from noise; leave latents and eta out.")
        if not self._of_tokens() and temperature is not None:
            raise ValueError(
                f"temperature is of a network of tokens; this pipeline has a {type(self._network).__name__}."
            )

    def _token_images(self, vectors: Tensor, generator: Any, output_type: str, settings: dict[str, Any]) -> Any:
        """Images of a network of tokens given vectors."""
        pipe = self._token_pipeline()
        pipe.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
        made = pipe(condition=vectors, generator=generator, output_type=output_type, return_dict=False, **settings)
        self._num_timesteps = pipe.num_timesteps
        return made[0]

    def _check(
        self, output_type: str, scale: float, class_labels: Any, condition: Any, given: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels and vectors as given."""
        sampling.check_output_type(output_type)
        sampling.check_number("guidance_scale", scale)
        width, has_null = self._takes()
        if given > 1:
            raise ValueError("Vectors come from condition, from prior, or from the pipeline's own prior; give one.")
        if not given:
            self._need(self.prior, "prior to draw vectors: give condition= or prior=, or load one")
        if scale > 1 and not has_null:
            raise ValueError(
                f"guidance_scale={scale} needs a null vector, which {type(self._network).__name__} was trained "
                "without (condition_embedding=None). Leave it at 1."
            )
        return self._given_labels(class_labels), given_vectors(condition, width)

    def _noise(self, count: int, generator: Any, latents: Tensor | None) -> Tensor:
        """Noise to start from, `(B, C, h, w)`, float32 or wider."""
        family, device = family_of(self._network), torch.device(self._execution_device)
        if latents is not None:
            sampling.check_latents(latents, family.channels(), multiple=family.multiple())
            return latents.to(device, torch.promote_types(latents.dtype, torch.float32))
        shape = (check_whole("batch_size", count), family.channels(), *family.size())
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _predictor(self) -> Callable[[int, Tensor, dict[str, Any]], dict[str, Tensor]]:
        """What the sampler of images steps with; vectors enter once, not at every step."""
        network, scheduler = self._network, self.scheduler
        family, bound = family_of(network), self._bound()
        entered: list[Any] = [None, None, {}]  # vectors, whether guided, inputs

        def inputs(vectors: Tensor, guided: bool) -> dict[str, Any]:
            if entered[0] is not vectors or entered[1] != guided:
                both = torch.cat([vectors] * 2) if guided else vectors
                dropped = torch.arange(len(both), device=both.device) < len(both) - len(vectors)
                made = bound.inputs(both, dropped if guided else None)
                entered[:] = vectors, guided, made
            return entered[2]

        def predict(step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
            latents, guided = tensors["latents"], self.do_classifier_free_guidance
            channels = latents.shape[1]
            x = torch.cat([latents] * 2) if guided else latents
            x = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            named = {
                family.sample_name: x.to(network.dtype),
                family.timestep_name: torch.as_tensor(t, device=x.device).expand(len(x)),
            }
            output = network(**named, **inputs(tensors["condition"], guided), return_dict=False)[0].to(latents.dtype)
            if guided:
                null, cond = output.chunk(2)
                combined = null[:, :channels] + self.guidance_scale * (cond[:, :channels] - null[:, :channels])
                output = torch.cat([combined, cond[:, channels:]], 1)
            return {"latents": sampling.without_variance(scheduler, output, channels)}

        return predict

    def _images(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = latents if self.vae is None else decode_latents(self.vae, latents)
        return sampling.pack_images(images.float(), output_type)
