"""`CFG`: classifier-free guidance within an interval of noise levels, in place of the pipeline's own."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import Guidance, GuidanceTerm, check_finite
from diffusers_repr.noise import NoiseLevel


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance: `eps_null + s (eps_cond - eps_null)` (Ho and Salimans 2022, arXiv 2207.12598).

    It replaces the guidance of the pipeline, whose `guidance_scale` then only has to be above 1, so that it encodes
    the null condition (Flux: `true_cfg_scale`, with a negative prompt). Outside of `interval` (Kynkaanniemi et al.
    2024, arXiv 2404.07724) the prediction is the conditional one, and the null rows of the batch are not run (Flux
    calls its network a second time all the same). The scale of diffusers: 1 is no guidance, the paper's w is s - 1.

    At each noise level the score is that of `p(x_t) p(c | x_t)^s`; samples are those of `p(x | c)` for s = 1 and of
    `p(x)` for s = 0, but for no other s those of `p(x) p(c | x)^s` (see `ClassifierGuidance`).

    Attributes:
        scale: s; 1 is off. Default: diffusers' for Stable Diffusion.
        interval: Where it acts; None is everywhere.
        rescale: Share phi in [0, 1] of the result that is brought to the standard deviation of the conditional
            prediction, in the network's form of it (Lin et al. 2023, arXiv 2305.08891, eqs. 15 and 16):
            `guidance_rescale` of diffusers, which pipelines are then called without. Terms of other guidances are
            added after.
    """

    scale: float = 7.5
    rescale: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("CFG.rescale", self.rescale)
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale must be in [0, 1]; got {self.rescale}.")
        if self.adaptive:
            raise ValueError("CFG has no adaptive scale; give it an interval.")

    def bind(self, denoiser: Denoiser) -> CFGTerm:
        """Ready for a model.

        Raises:
            ValueError: For an interval outside of the model's noise levels.
        """
        return CFGTerm(self, denoiser)


class CFGTerm(GuidanceTerm):
    """The rule by which the conditional and the null prediction become one."""

    config: CFG
    videos = True

    def weight(self, level: NoiseLevel) -> float:
        """`s - 1` inside the interval, 0 outside."""
        return self.config.scale - 1.0 if self.inside(level) else 0.0

    def combine(self, cond: Tensor, null: Tensor, weight: float) -> Tensor:
        """`cond + (s - 1) (cond - null)`: the same in every form of the prediction; then rescaled."""
        combined = cond + weight * (cond - null)
        share = self.config.rescale
        if not share:
            return combined
        axes = tuple(range(1, cond.ndim))
        factor = cond.std(axes, keepdim=True) / combined.std(axes, keepdim=True)
        return combined * (1 - share + share * factor)

    def needs_null(self, pipe: Any) -> str:
        """Message for a call without the null condition."""
        if pipe is None:
            return (
                "CFG needs the null condition, but the loop calls the network without one. Give its inputs: "
                "guide(denoiser, ..., null=condition)."
            )
        name, takes = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
        if "true_cfg_scale" in takes:
            how = "Call it with true_cfg_scale > 1 (any value: CFG replaces it) and a negative_prompt"
        elif "guidance_scale" in takes:
            how = "Call it with guidance_scale > 1 (any value: CFG replaces it)"
        else:
            how = (
                "It takes no guidance_scale, so it never will: PAG and SAG need no condition, and a class-conditional "
                "UNet2DModel is sampled by GuidedUnconditionalPipeline"
            )
        return f"CFG needs the null condition, but {name} calls the network without one. {how}."
