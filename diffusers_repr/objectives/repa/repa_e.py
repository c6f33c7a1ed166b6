"""REPA-E (arXiv 2504.10483): the VAE is trained too; of the losses of the network only the alignment reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub.compiled import is_compiled_in_place
from diffusers_repr.noise import NoiseLevel, add_noise, training_target
from diffusers_repr.objectives.artifacts import ModelArtifact
from diffusers_repr.objectives.auxiliary.base import Observation, full_precision, widen
from diffusers_repr.objectives.base import Batch, weighted_sum
from diffusers_repr.objectives.noisy import NoisyBatch
from diffusers_repr.objectives.repa.latent_norm import LatentNorm
from diffusers_repr.objectives.repa.objective import REPAObjective
from diffusers_repr.objectives.repa.vae_statistics import NormalizingVAE, latent_statistics
from diffusers_repr.objectives.teachers import Teachers


@dataclass
class _Kept:
    """What the later phases of a micro-batch take from the first."""

    latents: Tensor
    level: NoiseLevel
    noise: Tensor
    teachers: Teachers
    reconstruction: Tensor


class REPAEObjective(REPAObjective):
    """End-to-end training of VAE and network, in phases.

    `vae`: `L1 + kl_weight KL + perceptual + adversarial_weight (-D(reconstruction)) + vae_coefficient alignment`
    updates the VAE; the network is fixed, in eval mode, without label dropout, and runs up to the aligned layer.
    `discriminator` (only with `adversarial`): its hinge loss. `main`: the loss of `REPAObjective` on the latents that
    the VAE gave before its update, detached, with the same times and noise, updates the network and the projectors.
    Latents are normalised by `LatentNorm`: running statistics in the first phase, those of the batch in the last.

    The paper's recipe has LPIPS as `perceptual` and a patch discriminator as `adversarial`; neither is part of this
    package, and without them reconstructions blur. Its learning rate is 1e-4 for all, its weights are the defaults.

    Args:
        denoiser: With an `AutoencoderKL` or another VAE whose `encode` gives a posterior.
        encoders: At least one.
        layer: As `REPAObjective`.
        coefficient: Of the alignment in the phase `main`.
        vae_coefficient: Of the alignment in the phase `vae`.
        kl_weight: Of the KL divergence, summed over a latent, from the standard normal.
        perceptual: `(reconstruction, images) -> distances`, both (B, C, H, W) in [-1, 1]; kept frozen. None: left out.
        perceptual_weight: Of their mean.
        adversarial: Discriminator, `images -> logits`, trained in its own phase. None: left out.
        adversarial_weight: Of its part in the VAE's loss.
        **options: As `REPAObjective`.

    Raises:
        ValueError: Without a VAE or encoders, or for a weight that is negative or not finite.
    """

    discarded = ("adversarial",)  # the caller's own
    _kept: dict[int, _Kept]
    _trained: set[str] | None

    def __init__(
        self,
        denoiser: Denoiser,
        encoders: Sequence[Any] | Mapping[str, Any],
        layer: str | None = None,
        coefficient: float | None = None,
        *,
        vae_coefficient: float = 1.5,
        kl_weight: float = 1e-6,
        perceptual: nn.Module | None = None,
        perceptual_weight: float = 1.0,
        adversarial: nn.Module | None = None,
        adversarial_weight: float = 0.1,
        **options: Any,
    ) -> None:
        if denoiser.vae is None or not hasattr(denoiser.vae, "encode"):
            raise ValueError("REPA-E trains a VAE together with the network; the denoiser has none.")
        if not encoders:
            raise ValueError("REPA-E trains the VAE by alignment with an encoder; pass encoders.")
        self_weights = {
            "reconstruction": 1.0,
            "kl": kl_weight,
            "perceptual": perceptual_weight,
            "adversarial": adversarial_weight,
            "alignment": vae_coefficient,
        }
        for name, weight in self_weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"The weight of {name!r} must be finite and not negative; got {weight}.")
        super().__init__(denoiser, encoders, layer, coefficient, **options)
        self.vae_weights = self_weights
        self.frozen.pop("vae")
        self.vae = denoiser.vae.requires_grad_(True)
        self.latent_norm = LatentNorm(denoiser.family.channels())
        self.latent_norm.set_statistics(*latent_statistics(self.vae))
        self.adversarial = adversarial
        if perceptual is not None:
            self.freeze("perceptual", perceptual)
        self.phases = ("vae", "discriminator", "main") if adversarial is not None else ("vae", "main")
        self._kept, self._trained = {}, None

    # Phases

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a phase; call them in order for each micro-batch, told apart by `micro` in the batch.

        Raises:
            ValueError: For an unknown phase, or one that comes before `vae`.
        """
        if phase not in self.phases:
            raise ValueError(f"phase={phase!r}; expected one of {', '.join(self.phases)}.")
        micro = batch.get("micro", 0)
        if phase != "vae" and micro not in self._kept:
            raise ValueError(f"The phase {phase!r} needs the latents of the phase 'vae' of the same micro-batch.")
        self._enter(phase)
        if phase == "vae":
            return self._vae_loss(batch, micro)
        if phase == "discriminator":
            return self._discriminator_loss(batch, self._kept[micro])
        kept = self._kept.pop(micro)
        x0 = self.latent_norm(kept.latents)
        target = training_target(x0, kept.noise, kept.level, self.denoiser.schedule)
        x_t = add_noise(x0, kept.level, kept.noise)
        noisy = NoisyBatch(x0, kept.noise, kept.level, x_t, target, self.condition(batch, len(x0)), batch)
        return self.combine(*self.observe(noisy, kept.teachers))

    def _vae_loss(self, batch: Batch, micro: int) -> dict[str, Tensor]:
        images = batch["pixel_values"]
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        latents = posterior.sample(generator=batch.get("generator"))
        reconstruction = self.vae.decode(latents).sample
        noisy = self.noised(batch, x0=self.latent_norm(latents), drop=False)
        teachers = self.teachers_of(noisy)
        aligned = self.losses["alignment"](self._prefix(noisy, teachers))
        with full_precision(images.device):
            losses = {
                "reconstruction": F.l1_loss(widen(reconstruction), widen(images)),
                "kl": widen(posterior.kl()).mean(),
                "alignment": aligned,
            }
        if "perceptual" in self.frozen:
            losses["perceptual"] = widen(self.frozen["perceptual"](reconstruction, images)).mean()
        if self.adversarial is not None:
            losses["adversarial"] = -widen(self.adversarial(reconstruction)).mean()
        self._kept[micro] = _Kept(latents.detach(), noisy.level, noisy.noise, teachers, reconstruction.detach())
        return weighted_sum(losses, self.vae_weights)

    def _discriminator_loss(self, batch: Batch, kept: _Kept) -> dict[str, Tensor]:
        assert self.adversarial is not None
        real, fake = self.adversarial(batch["pixel_values"]), self.adversarial(kept.reconstruction)
        return {"loss": (F.relu(1 - widen(real)).mean() + F.relu(1 + widen(fake)).mean()) / 2}

    def _prefix(self, noisy: NoisyBatch, teachers: Teachers) -> Observation:
        """What the alignment looks at; the network ends behind the layer, where nothing stands against that."""
        layer = self.losses.each["alignment"].layers[0]
        model: Any = self.network
        whole = (
            is_compiled_in_place(model)
            or getattr(model, "gradient_checkpointing", False)
            or type(model).__name__.startswith("FSDP")
        )
        if whole:
            with self.losses.recording() as recorded:
                self.predict(noisy)
            value = recorded[layer]
        else:
            with capture(model, layer) as tape:
                self.predict(noisy)
            value = tape[layer]
        tokens = {layer: self.layer_tokens(layer, value, noisy.size)}
        return Observation(noisy, noisy.x_t, tokens, {}, teachers)

    def _enter(self, phase: str) -> None:
        """Gradients and training mode for the parts of a phase alone.

        Both stay until the next phase: gradient checkpointing runs parts of the forward again in the backward pass.
        """
        names = self._owned(phase)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in names)
        for part in (self.network, self.losses, self.latent_norm):
            part.train(self.training and phase == "main")
        self.vae.train(self.training and phase == "vae")

    def _owned(self, phase: str) -> set[str]:
        """Names of the parameters that a phase trains, of those that were to be trained at the first call."""
        if self._trained is None:
            self._trained = {name for name, p in self.named_parameters() if p.requires_grad}
        prefixes = {"vae": ("vae.",), "discriminator": ("adversarial.",), "main": ("network.", "terms.")}[phase]
        return {name for name in self._trained if name.startswith(prefixes)}

    # What the loop asks for

    def param_groups(self, phase: str = "main") -> list[dict[str, Any]]:
        """The VAE, the discriminator, or the network with its projectors."""
        names = self._owned(phase)
        return [{"params": [p for name, p in self.named_parameters() if name in names]}]

    def trained_state(self) -> dict[str, Tensor]:
        """Parameters of all phases, and persistent buffers."""
        self._owned("main")
        fixed = {name for name, _ in self.named_parameters() if name not in (self._trained or ())}
        own = {name: value for name, value in self.state_dict().items() if name not in fixed}
        return {**own, **self.losses.kept_state("terms")}

    def ema_modules(self) -> dict[str, nn.Module]:
        """The network, and the statistics of its latents; the VAE is saved as trained."""
        return {**super().ema_modules(), "latent_norm": self.latent_norm}

    def on_step_end(self, step: int, ema: Any) -> None:
        """Forget latents that no phase has asked for."""
        super().on_step_end(step, ema)
        self._kept.clear()

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Also: images must be there.

        Raises:
            ValueError: For a batch of cached latents.
        """
        super().check_batch(batch)
        if batch.get("pixel_values") is None:
            raise ValueError("REPA-E trains the VAE on images; train on pixel_values, not on cached latents.")

    def identity(self) -> dict[str, Any]:
        """With the weights of the VAE's losses."""
        return {**super().identity(), "vae_weights": self.vae_weights, "phases": list(self.phases)}

    def trained_components(self) -> dict[str, ModelArtifact]:
        """With the trained VAE, which gives and takes normalised latents."""
        pipe = self.denoiser.pipe
        vae = NormalizingVAE(self.vae, "vae", averaged=False, norm=self.latent_norm, pipeline=type(pipe))
        return {**super().trained_components(), "vae" if hasattr(pipe, "vae") else "vqvae": vae}


__all__ = ["REPAEObjective"]
