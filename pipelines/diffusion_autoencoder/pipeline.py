"""Images to codes and back, between them and along a direction, by a diffusion autoencoder. Needs `diffusers-repr`.

`DiffusionAutoencoderPipeline.from_pretrained(X)` without remote code, or `DiffusionPipeline.from_pretrained(X,
custom_pipeline=<this folder or its Hub id>, trust_remote_code=True)`, where X is a folder or Hub id that
`examples/train_autoencoder.py` or `DiffusionAutoencoderPipeline.save_pretrained` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffusers_repr.assign import IdentityAssigner
from diffusers_repr.capture.semantic_decoder import CODE, COEFFICIENTS, SemanticDecoder, semantic_denoiser
from diffusers_repr.denoiser import Denoiser, sampling
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.family_registry import family_of
from diffusers_repr.denoiser.inversion import ddim_generate, ddim_invert
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.denoiser.vae import decode_latents
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.own_pipelines import OwnComponentsMixin, named_pipeline
from diffusers_repr.models.film import FiLM
from diffusers_repr.models.gradient_unet import GradientUNet
from diffusers_repr.models.null_tokens import NullTokens
from diffusers_repr.models.representation_mlp import RepresentationMLPModel
from diffusers_repr.models.semantic_encoder import SemanticEncoder
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.tasks.autoencoding import AutoencodingMixin


@dataclass
class DiffusionAutoencoderCode(BaseOutput):
    """What `encode` returns.

    Attributes:
        code: z, `(B, D)`, float32: what the image is of.
        x_T: The noise that DDIM walks to, given z, `(B, C, h, w)`: its details; None where it was not asked for.
    """

    code: Tensor
    x_T: Tensor | None = None


@dataclass
class DiffusionAutoencoderOutput(BaseOutput):
    """What `decode` and all that decodes returns.

    Attributes:
        images: PIL images, an array `(B, H, W, C)` or a tensor `(B, C, H, W)`.
        code: The codes they were made from, `(B, D)`.
        x_T: The noise they were made from.
    """

    images: Any
    code: Tensor
    x_T: Tensor


class DiffusionAutoencoderPipeline(AutoencodingMixin, sampling.SamplingMixin, OwnComponentsMixin, DiffusionPipeline):
    """An encoder, and a denoiser that is told its code: DiffAE, InfoDiffusion and PDAE.

    DiffAE (Preechakul et al. 2022, arXiv 2111.15640) and InfoDiffusion (Wang et al. 2023, arXiv 2306.08757): the code
    scales (and shifts) the activations of the U-Net. PDAE (Zhang et al. 2022, arXiv 2212.12990): the U-Net is a frozen
    one, and a gradient network corrects it. Encoding and decoding walk the same levels by DDIM, without clipping.

    Args:
        encoder: Images to codes.
        unet: Denoises images or latents.
        film: How the code enters.
        scheduler: The noise process, and the sampler of `__call__`.
        gradient: Beside a frozen `unet`.
        vae: Of latents; None of a model of pixels in [-1, 1].
        null_tokens: The tokens of an empty prompt, of a text-conditional `unet`.
        prior: Draws codes, standardised.
        prior_scheduler: Its sampler.
        null_label: The class that a class-conditional `unet` is told.
        normal_codes: Whether codes were trained to be standard normal, so that they can be drawn without a prior.
        code_mean: Of the training codes, by which those of the prior are brought back.
        code_std: As `code_mean`.
        coefficient: What the gradient network is multiplied by: `posterior`, as it is trained, or `score`, as the
            paper's code steps by DDIM.

    Raises:
        ValueError: For a missing or another base than the gradient network was trained beside, parts of other
            autoencoders, and a prior without its sampler, mean and deviation.
    """

    model_cpu_offload_seq = "encoder->prior->vae->unet"
    _exclude_from_cpu_offload = ["film", "gradient", "null_tokens"]  # of every step
    _optional_components = ["unet", "gradient", "vae", "null_tokens", "prior", "prior_scheduler"]
    _callback_tensor_inputs = ["latents", "code"]

    def __init__(
        self,
        encoder: SemanticEncoder,
        film: FiLM,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | UNet2DConditionModel | None = None,
        gradient: GradientUNet | None = None,
        vae: AutoencoderKL | None = None,
        null_tokens: NullTokens | None = None,
        prior: RepresentationMLPModel | None = None,
        prior_scheduler: SchedulerMixin | None = None,
        null_label: int | None = None,
        normal_codes: bool = False,
        code_mean: Sequence[float] | None = None,
        code_std: Sequence[float] | None = None,
        coefficient: str = "posterior",
    ) -> None:
        super().__init__()
        self.register_modules(
            encoder=encoder, film=film, scheduler=scheduler, unet=unet, gradient=gradient, vae=vae,
            null_tokens=null_tokens, prior=prior, prior_scheduler=prior_scheduler,
        )  # fmt: skip
        self.register_to_config(
            null_label=null_label, normal_codes=normal_codes, code_mean=code_mean, code_std=code_std,
            coefficient=coefficient,
        )  # fmt: skip
        self._check_parts()

    def _check_parts(self) -> None:
        if self.gradient is not None:
            self.gradient.check_base(self.unet)
        if self.unet is None:
            raise ValueError("The U-Net of this autoencoder is missing; pass unet=, the one it was trained with.")
        widths = {"encoder": self.encoder.config["code_dim"], "film": self.film.config["code_dim"]}
        if self.prior is not None:
            widths["prior"] = self.prior.config["in_channels"]
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{name} {width}" for name, width in widths.items())
            raise ValueError(f"The parts are of codes of different widths ({told}): they are not of one autoencoder.")
        if self.config.coefficient not in COEFFICIENTS:
            raise ValueError(f"coefficient is one of {', '.join(COEFFICIENTS)}; got {self.config.coefficient!r}.")
        if self.prior is not None:
            if self.prior_scheduler is None:
                raise ValueError("prior is there without its prior_scheduler; pass both.")
            sizes = [len(self.config[name] or ()) for name in ("code_mean", "code_std")]
            if sizes != [widths["prior"]] * 2:
                raise ValueError(
                    f"The prior draws standardised codes of {widths['prior']} values, and code_mean and code_std "
                    f"bring them back; they have {sizes[0]} and {sizes[1]}. pipe.load_prior(folder) sets all of it."
                )
        SemanticDecoder(self.unet, self.film, self.gradient, self._schedule())  # refuses parts that do not fit

    # Parts as one denoiser

    def _schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_scheduler(self.scheduler)

    @property
    def denoiser(self) -> Denoiser:
        """U-Net, modulation and gradient network as one `Denoiser`, whose condition is `pipe.condition(code)`."""
        schedule = self._schedule()
        decoder = SemanticDecoder(self.unet, self.film, self.gradient, schedule, self.config.coefficient)
        return semantic_denoiser(decoder, self.scheduler, self.vae, schedule, self)

    def condition(self, code: Tensor | None, count: int | None = None) -> dict[str, Any]:
        """Inputs of the network by name.

        Args:
            code: `(B, D)`; None: the frozen U-Net alone.
            count: B, where there is no code.
        """
        device = torch.device(self._execution_device)
        rows = len(code) if code is not None else check_whole("count", count)
        made: dict[str, Any] = {} if code is None else {CODE: code.to(device)}
        if self.null_tokens is not None:
            tokens = self.null_tokens.tokens.to(device, floating_dtype(self.unet))
            made["encoder_hidden_states"] = tokens.expand(rows, -1, -1)
        if self.config.null_label is not None:
            made["class_labels"] = torch.full((rows,), self.config.null_label, device=device)
        return made

    # Images to codes

    @torch.no_grad()
    def encode(
        self, images: Any, num_inference_steps: int | None = 100, image_size: ImageSize = None
    ) -> DiffusionAutoencoderCode:
        """Codes of images, and the noise that decodes to them.

        Args:
            images: PIL images, arrays or tensors of one size.
            num_inference_steps: DDIM steps to the noise, as many as it is to be decoded with; None: the code alone,
                for which no U-Net runs.
            image_size: (H, W) or one side that they are resized to; the model's own if None, `"keep"` for theirs.

        Raises:
            ValueError, TypeError: For what are no images, and sizes that do not suit the model.
        """
        denoiser = self.denoiser
        pixels = denoiser.pixels(images, image_size).to(self._execution_device)
        with eval_mode(self.encoder):
            code = self.encoder(pixels.to(floating_dtype(self.encoder))).code.float()
        x_T = None
        if num_inference_steps is not None:
            x0 = denoiser.encode_pixels(pixels).float()
            x_T = ddim_invert(denoiser, x0, num_inference_steps, self.condition(code))
        self.maybe_free_model_hooks()
        return DiffusionAutoencoderCode(code, x_T)

    @torch.no_grad()
    def decode(
        self,
        code: Tensor,
        x_T: Tensor | None = None,
        num_inference_steps: int = 100,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        size: tuple[int, int] | None = None,
    ) -> DiffusionAutoencoderOutput:
        """Images of codes, by deterministic DDIM.

        Args:
            code: z, `(B, D)`, or one for all.
            x_T: Noise `(B, C, h, w)`, of `encode`: the same details; None: drawn, other details.
            num_inference_steps: DDIM steps, as many as it was encoded with.
            generator: Of drawn noise: one, or one an image.
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`.
            size: (H, W) of drawn noise, in pixels or latents; the model's own if None.

        Raises:
            ValueError: For codes of another width, noise of another shape, and numbers of both that differ.
        """
        sampling.check_output_type(output_type)
        code = self.check_code(code)
        if x_T is None:
            count = sampling.count_samples(code=code, generator=generator)
            x_T = self._noise(count, generator, size)
        sampling.check_latents(x_T, self._channels)
        if len(code) not in (1, len(x_T)):
            raise ValueError(f"{len(code)} codes for {len(x_T)} samples of noise; give one for all, or one each.")
        code = code.expand(len(x_T), -1)
        x_T = x_T.to(self._execution_device)
        x0 = ddim_generate(self.denoiser, x_T, num_inference_steps, self.condition(code))
        images = self._images(x0, output_type)
        self.maybe_free_model_hooks()
        return DiffusionAutoencoderOutput(images, code, x_T)

    # Codes out of nothing

    def load_prior(self, folder: str | Path) -> None:
        """Take the model of codes that `examples/train_representation.py` wrote; it is saved with this pipeline.

        Args:
            folder: An `RCGPipeline` of vectors with its `assigner/`, trained on codes of this encoder, standardised
                over the columns.

        Raises:
            ValueError: For codes of another width, and vectors standardised one by one, which cannot be brought back.
        """
        pipe = named_pipeline("RCGPipeline").from_pretrained(folder)
        assigner = IdentityAssigner.from_pretrained(Path(folder) / "assigner")
        if assigner.config["over"] != "column" or assigner.config["normalize"]:
            raise ValueError(
                f"{str(folder)!r} draws vectors standardised one by one, which cannot be brought back to codes; train "
                "it with `over: column`."
            )
        width = self.encoder.config["code_dim"]
        if pipe.prior is None or pipe.prior.config["in_channels"] != width:
            raise ValueError(f"{str(folder)!r} draws no codes of {width} values, which this encoder has.")
        self.register_modules(prior=pipe.prior, prior_scheduler=pipe.prior_scheduler)
        self.register_to_config(code_mean=assigner.mean.tolist(), code_std=assigner.std.tolist())

    @torch.no_grad()
    def sample_codes(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 250,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Codes `(B, D)`: of the prior, or standard normal ones where they were trained to be that.

        Args:
            batch_size: Number of them.
            num_inference_steps: Of the prior's sampler.
            generator: One, or one a code.

        Raises:
            ValueError: Without either.
        """
        device = torch.device(self._execution_device)
        if self.prior is not None:
            vectors = named_pipeline("RCGPipeline")(self.prior, self.prior_scheduler)
            vectors.set_progress_bar_config(**getattr(self, "_progress_bar_config", {}))
            drawn = vectors.sample_representations(
                batch_size, generator=generator, num_inference_steps=num_inference_steps
            )
            mean, std = (torch.tensor(self.config[name], device=drawn.device) for name in ("code_mean", "code_std"))
            return mean + std * drawn
        if not self.config.normal_codes:
            raise ValueError(
                "This autoencoder has no prior to draw codes from: give code=, or train one on its codes "
                "(examples/train_representation.py, as by examples/configs/codes_digits.yaml) and "
                "pipe.load_prior(folder)."
            )
        return randn_tensor((batch_size, self.encoder.config["code_dim"]), generator=generator, device=device)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        code: Tensor | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        latents: Tensor | None = None,
        prior_num_inference_steps: int = 250,
        gradient_stop: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> DiffusionAutoencoderOutput | tuple[Any]:
        """Samples, by the pipeline's scheduler.

        Args:
            batch_size: Number of samples; as many as there are codes, latents or generators if None, else 1.
            code: z, `(B, D)` or one for all, in place of drawing them by `sample_codes`.
            num_inference_steps: Steps of the scheduler.
            generator: One, or one a sample, which makes a sample independent of its batch.
            eta: Noise of DDIM, from 0 to 1. Other schedulers take none but 0.
            latents: Standard normal noise `(B, C, h, w)` to start from, in place of drawing it.
            prior_num_inference_steps: Of the codes' sampler.
            gradient_stop: Share of the timesteps, the least noisy ones, in which a frozen base runs alone; 0.3 in PDAE
                for drawn codes.
            output_type: `pil`, `np` (B, H, W, C) and `pt` (B, C, H, W) in [0, 1], or `latent`.
            return_dict: False returns the tuple `(images,)`.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; tensors that it
                returns by name take the place of these.
            callback_on_step_end_tensor_inputs: Names of the tensors it gets: `latents`, `code`.

        Raises:
            TypeError: For numbers that are none.
            ValueError: For codes and latents that do not fit, numbers of samples that differ, no prior where codes are
                to be drawn, and `gradient_stop` without a gradient network.
        """
        sampling.check_output_type(output_type)
        stop = sampling.check_number("gradient_stop", gradient_stop, 0, 1)
        if stop and self.gradient is None:
            raise ValueError(f"gradient_stop={gradient_stop}, but there is no gradient network: it would do nothing.")
        known = self._callback_tensor_inputs
        names = sampling.callback_names(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        extra = sampling.step_arguments(self.scheduler, generator, eta)
        code = None if code is None else self.check_code(code)
        count = sampling.count_samples(batch_size=batch_size, code=code, latents=latents, generator=generator)
        noise = self._noise(count, generator) if latents is None else latents
        sampling.check_latents(noise, self._channels)
        if code is None:
            code = self.sample_codes(count, prior_num_inference_steps, generator)
        noise = noise.to(self._execution_device, torch.promote_types(noise.dtype, torch.float32))
        self._num_timesteps = sampling.set_timesteps(self.scheduler, num_inference_steps, noise.device)
        tensors: dict[str, Any] = {
            "latents": noise * getattr(self.scheduler, "init_noise_sigma", 1.0),
            "code": code.to(noise.device).expand(count, -1),
        }
        self._interrupt = False
        with self.denoiser.evaluating():
            predict = self._predictor(stop)
            samplers, steps = {"latents": self.scheduler}, self.scheduler.timesteps
            tensors = self._denoise(steps, tensors, predict, samplers, extra, callback_on_step_end, names)
        images = self._images(tensors["latents"], output_type)
        self.maybe_free_model_hooks()
        return (images,) if not return_dict else DiffusionAutoencoderOutput(images, tensors["code"], noise)

    def _predictor(self, stop: float) -> Callable[[int, Tensor, dict[str, Any]], dict[str, Tensor]]:
        scheduler, network, channels = self.scheduler, self.denoiser.model, self._channels
        last = stop * self.denoiser.schedule.num_train_timesteps
        dtype = floating_dtype(self.unet)

        def predict(step: int, t: Tensor, tensors: dict[str, Any]) -> dict[str, Tensor]:
            x = tensors["latents"]
            told = self.condition(None if float(t) < last else tensors["code"], len(x))
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            times = torch.as_tensor(t, device=x.device).expand(len(x))
            output = network(scaled.to(dtype), times, **told)[0].to(x.dtype)
            return {"latents": sampling.without_variance(scheduler, output, channels)}

        return predict

    # What all share

    @property
    def _channels(self) -> int:
        return family_of(self.unet).bound_to(self.unet.config).channels()

    def check_code(self, code: Any) -> Tensor:
        """Codes of this autoencoder's width, finite.

        Raises:
            ValueError: For others.
        """
        width = self.encoder.config["code_dim"]
        if not isinstance(code, Tensor) or code.ndim != 2 or code.shape[1] != width or not code.is_floating_point():
            got = tuple(code.shape) if isinstance(code, Tensor) else type(code).__name__
            raise ValueError(f"Codes of this autoencoder are floats (B, {width}); got {got}.")
        if not bool(code.isfinite().all()):
            raise ValueError("The codes have NaN or infinite values.")
        return code.detach()

    def _noise(self, count: int, generator: Any, size: tuple[int, int] | None = None) -> Tensor:
        family = family_of(self.unet).bound_to(self.unet.config)
        h, w = family.size() if size is None else size
        shape = (check_whole("batch_size", count), family.channels(), h, w)
        return randn_tensor(
            shape, generator=generator, device=torch.device(self._execution_device), dtype=torch.float32
        )

    def _images(self, x0: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x0
        return sampling.pack_images((x0 if self.vae is None else decode_latents(self.vae, x0)).float(), output_type)
