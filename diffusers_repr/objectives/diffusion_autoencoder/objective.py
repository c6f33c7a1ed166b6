"""`DiffusionAutoencoderObjective`: an encoder, and a denoiser told its code; DiffAE, InfoDiffusion and PDAE."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from diffusers_repr.capture.semantic_decoder import SemanticDecoder, semantic_denoiser
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.hub.places import without_places
from diffusers_repr.models.film import FiLM, Modulation, film_blocks
from diffusers_repr.models.gathered import gathered
from diffusers_repr.models.gradient_unet import GradientUNet
from diffusers_repr.models.null_tokens import NullTokens
from diffusers_repr.models.semantic_encoder import SemanticEncoder, SemanticEncoderOutput
from diffusers_repr.noise.conversions import expand
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact, PipelineArtifact
from diffusers_repr.objectives.auxiliary.base import full_precision, widen
from diffusers_repr.objectives.base import Batch, weighted_sum
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.diffusion_autoencoder.config import PenaltyConfig
from diffusers_repr.objectives.diffusion_autoencoder.penalties import kl_divergence, mmd
from diffusers_repr.objectives.diffusion_autoencoder.weighting import snr_weights
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.times import TimeSampler

SIGNAL_LEFT = 0.02  # share of an image at the last timestep above which noise alone is no good start


class DiffusionAutoencoderObjective(DiffusionObjective):
    """`lambda_t |target - f(x_t, t, E(x_0))|^2`, and a penalty of the codes.

    | | base | code enters | penalty | levels |
    |---|---|---|---|---|
    | DiffAE (arXiv 2111.15640) | trained from nothing | `scale` | none | equal |
    | InfoDiffusion (arXiv 2306.08757) | trained from nothing | `scale_shift` | `mmd` or `kl` | equal |
    | PDAE (arXiv 2212.12990) | frozen, a gradient network beside it | `scale_shift` | none | `snr` |

    The encoder sees the clean image of the batch, in pixels. Beside a frozen base the target is the noise, whatever
    the base predicts. Logs `denoising` (weighted by level) and the penalty, of which the loss is made; of a frozen
    base also `frozen_mse` and `corrected_mse`, the plain errors without and with the code. Saved as a
    `DiffusionAutoencoderPipeline`, the encoder in `encoder/`.

    Args:
        denoiser: Of a `UNet2DModel` or `UNet2DConditionModel`, from a pipeline; any condition of it is the null one.
        encoder: Of the images; with `variational=True` for the penalty `kl`.
        config: Penalty and weights.
        frozen_base: Keep the denoiser, and train a `GradientUNet`.
        modulation: What the code does to the blocks: `scale` or `scale_shift`.
        time_sampling: How noise levels are drawn.

    Raises:
        ValueError: For a network without residual blocks that are told the time, an encoder of other channels, a
            frozen base that cannot be cut in halves or is no discrete diffusion, and a null condition that is neither
            a class nor one set of tokens.
    """

    own_losses = ("loss", "denoising", "mmd", "kl", "frozen_mse", "corrected_mse")

    def __init__(
        self,
        denoiser: Denoiser,
        encoder: SemanticEncoder,
        config: PenaltyConfig | None = None,
        *,
        frozen_base: bool = False,
        modulation: Modulation = "scale_shift",
        time_sampling: TimeSampler | None = None,
    ) -> None:
        config = config or PenaltyConfig()
        super().__init__(denoiser, time_sampling=time_sampling, label_dropout=0.0)
        channels = encoder.config["in_channels"]
        if channels != denoiser.image_channels:
            raise ValueError(
                f"The encoder takes images of {channels} channels, the denoiser makes images of "
                f"{denoiser.image_channels}; make it with in_channels={denoiser.image_channels}."
            )
        if config.penalty == "kl" and not encoder.config["variational"]:
            raise ValueError("The penalty kl is of an encoder that gives a normal: SemanticEncoder(variational=True).")
        self.config, self.frozen_base, self.encoder = config, frozen_base, encoder
        self.null_tokens, self.null_label = null_condition(denoiser)
        unet, dim = denoiser.model, encoder.config["code_dim"]
        self.gradient: GradientUNet | None = None
        if frozen_base:
            self.gradient = GradientUNet.of(unet, None if denoiser.name is None else without_places(denoiser.name))
            blocks = film_blocks(self.gradient.unet)
            del self.network  # it is neither trained nor saved as a part of this
            self.freeze("network", unet)
        else:
            blocks = film_blocks(unet)
        self.film = FiLM(dim, blocks, modulation)
        decoder = SemanticDecoder(unet, self.film, self.gradient, denoiser.schedule)
        self.decoder = semantic_denoiser(decoder, denoiser.scheduler, denoiser.vae, denoiser.schedule)
        if config.penalty != "none":
            warn_of_signal(denoiser)
        self.card = self._about()

    def _about(self) -> dict[str, Any]:
        text = (
            "`DiffusionAutoencoderPipeline` of `diffusers_repr.pipelines.diffusion_autoencoder` encodes, decodes and "
            'edits with it; `Encoder.from_pretrained("{folder}")` reads its encoder alone.'
        )
        tags = ["diffusers", "diffusers-repr", "autoencoder", "representations"]
        return {**self.card, "kind": "diffusion autoencoder", "pipeline_tag": "image-to-image", "text": text,
                "tags": tags}  # fmt: skip

    # Loss

    def condition(self, batch: Batch, count: int, drop: bool = True) -> dict[str, Any]:
        """The null condition: the code tells all."""
        if self.null_tokens is not None:
            return {"encoder_hidden_states": self.null_tokens.to(self._device()).expand(count, -1, -1)}
        if self.null_label is not None:
            return {"class_labels": torch.full((count,), self.null_label, device=self._device())}
        return {}

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch; `prior` (B, D) in it is what the MMD compares with, in place of drawn codes."""
        noisy = self.noised(batch)
        found: SemanticEncoderOutput = self.encoder(batch["pixel_values"])
        terms, told = self.errors(noisy, found.sample(batch.get("generator")))
        with full_precision(noisy.x0.device):
            terms |= self.penalties(found, batch)
        weights = {name: self.config.penalty_weight for name in ("mmd", "kl")}
        return {**weighted_sum(terms, weights), **told}

    def errors(self, noisy: NoisyBatch, code: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the loss is made of, `denoising`; and what is only logged of a frozen base."""
        decoder: Any = self.decoder.model
        x_t = noisy.x_t.to(floating_dtype(self.film))
        inputs = self.decoder.network_inputs(x_t, noisy.level, noisy.condition)
        if self.gradient is None:
            raw = decoder(**inputs, code=code)
            return {"denoising": self._weighted(self.decoder.family.output(raw, x_t), noisy.target, noisy)}, {}
        frozen, shift = decoder.halves(inputs.pop("sample"), inputs.pop("timestep"), code, **inputs)
        corrected = frozen - shift
        with full_precision(x_t.device):
            told = {name: (widen(value.detach()) - noisy.noise).square().mean()
                    for name, value in {"frozen_mse": frozen, "corrected_mse": corrected}.items()}  # fmt: skip
        return {"denoising": self._weighted(corrected, noisy.noise, noisy)}, told

    def _weighted(self, prediction: Tensor, target: Tensor, noisy: NoisyBatch) -> Tensor:
        with full_precision(target.device):
            error = (widen(prediction) - target).square()
            if self.config.weighting == "snr":
                error = expand(snr_weights(noisy.level, self.config.snr_gamma), error) * error
            return error.mean()

    def penalties(self, found: SemanticEncoderOutput, batch: Batch) -> dict[str, Tensor]:
        """The penalty by its name, of the codes of all processes; nothing where there is none."""
        if self.config.penalty == "kl":
            assert found.log_variance is not None
            return {"kl": kl_divergence(found.code, found.log_variance, self.config.kl_capacity)}
        if self.config.penalty == "none":
            return {}
        codes, prior = widen(found.code), batch.get("prior")
        if prior is None:
            prior = torch.randn(codes.shape, device=codes.device, generator=batch.get("generator"))
        if dist.is_initialized() and dist.get_world_size() > 1:
            codes, prior = gathered(codes), gathered(prior)
        return {"mmd": mmd(codes, prior, self.config.mmd_kernel)}

    def encode(self, images: Tensor) -> Tensor:
        """Codes `(B, D)` of images `(B, C, H, W)` in [-1, 1], as the pipeline gives them."""
        return self.encoder(images).code

    def _device(self) -> torch.device:
        return next(self.film.parameters()).device

    # Checks

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Images must be there, for the encoder; two or more where codes are compared, or features standardised.

        Raises:
            ValueError: Naming what is missing.
        """
        if batch.get("pixel_values") is None:
            raise ValueError(
                "A diffusion autoencoder encodes images; train on pixel_values, not on cached latents (latents_dir)."
            )
        if len(batch["pixel_values"]) < 2:
            if self.config.penalty == "mmd":
                raise ValueError("The penalty mmd compares codes; train with a batch of two or more images a process.")
            if self.encoder.config["standardize_features"]:
                raise ValueError(
                    "The encoder standardises its features over the batch; train with two images or more, or "
                    "`standardize_features: false`."
                )

    def check_data(self, data: Any) -> None:
        """Nothing: labels are not used."""

    def identity(self) -> dict[str, Any]:
        """With the switches, and the weights of a frozen base."""
        own: dict[str, Any] = {"frozen_base": self.frozen_base, "modulation": self.film.config["modulation"]}
        if self.frozen_base:
            own["base"] = weights_hash(self.denoiser.model)
        return {**super().identity(), **own}

    # What is saved

    def artifacts(self) -> list[Artifact]:
        """The pipeline: encoder, U-Net, modulation, and what else there is."""
        unet = self.denoiser.model
        parts: dict[str, Any] = {
            "encoder": ModelArtifact(self.encoder, "encoder"),
            "unet": unet if self.frozen_base else ModelArtifact(self.network, "network"),
            "film": ModelArtifact(self.film, "film"),
            "scheduler": deterministic(self.denoiser.scheduler),
        }
        if self.gradient is not None:
            parts["gradient"] = ModelArtifact(self.gradient, "gradient")
        if self.denoiser.vae is not None:
            parts["vae"] = self.denoiser.vae
        if self.null_tokens is not None:
            parts["null_tokens"] = tokens_as_model(self.null_tokens)
        parts |= {"null_label": self.null_label, "normal_codes": self.config.penalty != "none"}
        return [PipelineArtifact("DiffusionAutoencoderPipeline", parts)]

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """Samples of normal codes.

        Raises:
            ValueError: Without a penalty, which makes them normal; set `eval_batch_size` to 0.
        """
        if self.config.penalty == "none":
            raise ValueError(
                "Codes of a diffusion autoencoder without a penalty are drawn by a prior that is trained later, so "
                "there are no samples yet; set eval_batch_size to 0."
            )
        return pipe(batch_size=count, generator=generator, num_inference_steps=steps).images


def deterministic(scheduler: Any) -> Any:
    """DDIM without clipping, which DiffAE samples by, of a DDPM's noise process; another scheduler as it is."""
    if not isinstance(scheduler, DDPMScheduler):
        return scheduler
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False)


def null_condition(denoiser: Denoiser) -> tuple[Tensor | None, int | None]:
    """The null condition of a denoiser: tokens `(1, k, D)` of an empty prompt, or a class id; both None of none.

    Raises:
        ValueError: If it is anything else.
    """
    conditioner = denoiser.conditioner
    if not conditioner.conditional:
        return None, None
    with torch.no_grad():
        found = {name: value for name, value in conditioner.null(1).items() if value is not None}
    names = sorted(found)
    if names == ["encoder_hidden_states"] and found[names[0]].ndim == 3:
        return found[names[0]].detach().float(), None
    if names == ["class_labels"] and found[names[0]].dtype == torch.long:
        return None, int(found[names[0]])
    raise ValueError(
        f"The null condition of this {type(denoiser.model).__name__} is {', '.join(names)}; a diffusion autoencoder "
        "is of a network without a condition, with a null class, or with the tokens of an empty prompt alone."
    )


def tokens_as_model(tokens: Tensor) -> NullTokens:
    """Fixed tokens `(1, k, D)` as a component of a pipeline."""
    made = NullTokens(tokens.shape[2], tokens.shape[1], learned=False)
    made.tokens.copy_(tokens[0])
    return made


def warn_of_signal(denoiser: Denoiser) -> None:
    """Warn where sampling from noise alone begins at a level that training never saw: an image is left at the end."""
    schedule = denoiser.schedule
    if schedule.kind == "vp" and schedule.log_alpha_bar is not None:
        left = math.exp(0.5 * float(schedule.log_alpha_bar[-1]))
        if left > SIGNAL_LEFT:
            warnings.warn(
                f"At the last timestep of this noise schedule {left:.1%} of the image is left, and samples start from "
                "noise alone. Take a schedule that ends in noise, such as beta_end=0.02.",
                stacklevel=3,
            )


__all__ = ["DiffusionAutoencoderObjective", "null_condition", "tokens_as_model", "warn_of_signal"]
