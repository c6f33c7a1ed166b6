"""`DepthGuidance`: samples whose depth two predictors agree on, and which a prior of depth maps finds likely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import GradientRequest, Guidance, check_finite
from diffusers_repr.guidance.energy import EnergyTerm, check_update
from diffusers_repr.guidance.readout.base import head_readout, require_map_head, seen_levels
from diffusers_repr.heads import MapHead
from diffusers_repr.noise import LevelLike, NoiseLevel, add_noise


@dataclass(frozen=True, eq=False)
class DepthGuidance(Guidance):
    """Depth-Aware Guidance (Kim et al. 2022, arXiv 2212.08861): DCG, consistency of two heads; DPG, a depth prior.

    With d_s and d_w what a strong head (many layers) and a weak one (few) read:

    `energy = consistency_weight mean |d_w - sg(d_s)| + prior_weight mean (n - eps_phi(alpha d + sigma n))^2`

    where sg stops the gradient, d is d_s mapped from its range of labels to [-1, 1] and eps_phi a diffusion model of
    depth maps at one level. Means are of each sample. `eps + scale sigma grad energy`, by one backward pass through
    the network as far as the last layer of the heads. No code was published: the form is that of the paper's text,
    weights, `scale` and `prior_level` are free parameters that no source settles.

    Attributes:
        strong: Head of many layers (`depth_layers(model)` names the paper's). All heads are frozen meanwhile.
        weak: Head of few; None leaves the consistency out.
        prior: Denoiser of one-channel depth maps in [-1, 1], without VAE and condition; None leaves it out.
            Predictions are resized to its `sample_size`. Any network becomes one by a `GenericFamily`.
        consistency_weight: Of the first part; 0 leaves it out.
        prior_weight: Of the second; 0 leaves it out.
        prior_level: Noise level of the prior, a training timestep of its own or a `NoiseLevel`.
        update: `eps`, or `latent_sign`, `latent_adam` as `ReadoutGuidance`.
        interval: None is what lies in the `level_range` of the heads; the paper's are reliable below 800 of 1000.
        seed: Of n: one map for all samples, another at each noise level.
        checkpoint: Recompute activations in the backward pass.

    Raises:
        TypeError: For heads that are none on maps, and a prior that is no `Denoiser`.
        ValueError: If neither part is there, or a weight is negative.

    Example:
        >>> from diffusers_repr.heads import DepthHead
        >>> strong = DepthHead(["up_blocks.0.resnets.0", "up_blocks.1.resnets.0"], [16, 8], hidden=(8,))
        >>> weak = DepthHead(["up_blocks.1.resnets.0"], [8], hidden=(8,))
        >>> DepthGuidance(strong, weak, scale=50.0, interval=(0, 800)).consistent
        True
    """

    strong: MapHead = field(repr=False)
    weak: MapHead | None = field(default=None, repr=False)
    prior: Denoiser | None = field(default=None, repr=False, kw_only=True)
    consistency_weight: float = field(default=1.0, kw_only=True)
    prior_weight: float = field(default=1.0, kw_only=True)
    prior_level: LevelLike = field(default=NoiseLevel(nsr=1.0), kw_only=True)
    update: str = field(default="eps", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    checkpoint: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, head in (("strong", self.strong), ("weak", self.weak)):
            if name == "strong" or head is not None:
                require_map_head("DepthGuidance", head, name)
        if self.prior is not None and not isinstance(self.prior, Denoiser):
            raise TypeError(
                "prior must be a Denoiser of depth maps, such as Denoiser.from_pretrained(...) or "
                f"Denoiser(module, scheduler); got {type(self.prior).__name__}."
            )
        for name in ("consistency_weight", "prior_weight"):
            check_finite(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0; got {getattr(self, name)}.")
        check_update(self.update)
        if self.weak is self.strong:
            raise ValueError(
                "weak is the strong head itself: they agree everywhere. Give one that was trained on earlier layers "
                "(examples/train_readout.py --kind depth trains both)."
            )
        if not self.consistent and not self.likely:
            raise ValueError(
                "DepthGuidance has nothing to do: give a weak head (consistency), a prior, or both, with weights "
                "above 0."
            )

    @property
    def consistent(self) -> bool:
        """Whether the two heads are compared."""
        return self.weak is not None and self.consistency_weight > 0

    @property
    def likely(self) -> bool:
        """Whether the prior is asked."""
        return self.prior is not None and self.prior_weight > 0

    def bind(self, denoiser: Denoiser) -> DepthTerm:
        """Ready for a model.

        Raises:
            ValueError: For heads of another base or of unequal channels, a prior of other channels, a level that it
                does not have, and checkpointing that the model lacks.
        """
        return DepthTerm(self, denoiser)


class DepthTerm(EnergyTerm):
    """The energy of the depth that heads read."""

    config: DepthGuidance

    def __init__(self, config: DepthGuidance, denoiser: Denoiser) -> None:
        heads: list[Any] = [config.strong, *([config.weak] if config.consistent else [])]
        for head in heads:
            head.check_base(denoiser)
        if len({head.config["out_channels"] for head in heads}) > 1:
            raise ValueError(
                f"strong gives {heads[0].config['out_channels']} channels, weak {heads[1].config['out_channels']}; "
                "they must be equal."
            )
        self.level = self._prior_level(config) if config.likely else None
        modules = [*heads, *([config.prior.model] if config.likely and config.prior is not None else [])]
        request = GradientRequest(
            self._energy,
            tuple(dict.fromkeys(path for head in heads for path in head.config["layers"])),
            update=config.update,
            checkpoint=config.checkpoint,
            modules=tuple(modules),
        )
        interval = config.interval or seen_levels(denoiser.schedule, *heads)
        super().__init__(config.replace(interval=interval), denoiser, request)

    @staticmethod
    def _prior_level(config: DepthGuidance) -> NoiseLevel:
        prior = config.prior
        assert prior is not None
        channels, own = prior.family.channels(), int(config.strong.config["out_channels"])
        if prior.vae is not None or channels != own:
            raise ValueError(
                f"The prior takes {channels} channels{' of a VAE' if prior.vae is not None else ''}; the strong head "
                f"gives maps of {own}. Take a model of such maps in pixels."
            )
        level = prior.level(config.prior_level)
        if not float(level.sigma) > 0:
            raise ValueError("prior_level is without noise; the prior tells nothing there.")
        return level

    def _energy(self, features: Mapping[str, Tensor], x0: Tensor | None, call: NetworkCall, x: Tensor) -> Tensor:
        config = self.config
        sizes = [value.shape[-2:] for value in features.values()]
        size = max(h for h, _ in sizes), max(w for _, w in sizes)
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.likely):
            strong = head_readout(config.strong, features, call, x, size)
        loss = torch.zeros(len(x), device=x.device, dtype=x.dtype)
        if config.consistent and config.weak is not None:
            weak = head_readout(config.weak, features, call, x, size)
            loss = loss + config.consistency_weight * consistency(weak, strong)
        if config.likely and config.prior is not None and self.level is not None:
            maps = self._for_prior(strong, config.prior)
            noise = self._noise(maps, call)
            loss = loss + config.prior_weight * prior_energy(maps, noise, config.prior, self.level).to(x)
        return loss

    def _for_prior(self, depth: Tensor, prior: Denoiser) -> Tensor:
        low, high = self.config.strong.range
        maps = 2 * (depth - low) / (high - low) - 1
        if prior.config.get("sample_size") is not None:
            size = prior.family.size()
            maps = functional.interpolate(maps, size, mode="bilinear") if maps.shape[-2:] != size else maps
        return maps.to(prior.device)

    def _noise(self, maps: Tensor, call: NetworkCall) -> Tensor:
        place = round(1000 * float(call.level.timestep))
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + place)
        return torch.randn(1, *maps.shape[1:], generator=generator).to(maps).expand(maps.shape)


def consistency(weak: Tensor, strong: Tensor) -> Tensor:
    """`mean |d_w - sg(d_s)|` of each sample, `(B,)`: DCG."""
    return (weak - strong.detach()).abs().mean((1, 2, 3))


def prior_energy(maps: Tensor, noise: Tensor, prior: Denoiser, level: NoiseLevel) -> Tensor:
    """`mean (n - eps_phi(alpha d + sigma n))^2` of each sample, `(B,)`: DPG.

    Args:
        maps: Depth d in [-1, 1], `(B, C, H, W)`, float32 or wider.
        noise: n, the same shape.
        prior: eps_phi; the maps are cast to its dtype.
        level: A level of its own.
    """
    noisy = add_noise(maps, level, noise)
    found = prior.predict(noisy.to(prior.dtype), level).eps
    return (noise - found.to(maps.dtype)).square().mean((1, 2, 3))


__all__ = ["DepthGuidance", "DepthTerm", "consistency", "prior_energy"]
