"""`CFG`: classifier-free guidance within an interval of noise levels, in place of the pipeline's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import Guidance, Term
from diffusers_repr.noise import NoiseLevel


@dataclass(frozen=True)
class CFG(Guidance):
    """Classifier-free guidance: `eps_null + s (eps_cond - eps_null)` (Ho and Salimans 2022, arXiv 2207.12598).

    It replaces the guidance of the pipeline, whose `guidance_scale` then only has to be above 1, so that it encodes
    the null condition (Flux: `true_cfg_scale`, with a negative prompt). Outside of `interval` (Kynkaanniemi et al.
    2024, arXiv 2404.07724) the prediction is the conditional one, and the null rows of the batch are not run. The
    scale of diffusers: 1 is no guidance, the paper's w is s - 1.

    Attributes:
        scale: s; 1 is off. Default: diffusers' for Stable Diffusion.
        interval: Where it acts; None is everywhere.
    """

    scale: float = 7.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adaptive:
            raise ValueError("CFG has no adaptive scale; give it an interval.")

    def bind(self, denoiser: Denoiser) -> CFGTerm:
        """Ready for a model.

        Raises:
            ValueError: For an interval outside of the model's noise levels.
        """
        return CFGTerm(self, denoiser)


class CFGTerm(Term):
    """The rule by which the conditional and the null prediction become one."""

    def weight(self, level: NoiseLevel) -> float:
        """`s - 1` inside the interval, 0 outside."""
        return self.config.scale - 1.0 if self.inside(level) else 0.0

    def combine(self, cond: Tensor, null: Tensor, weight: float) -> Tensor:
        """`cond + (s - 1) (cond - null)`: the same in every form of the prediction."""
        return cond + weight * (cond - null)

    def needs_null(self, pipe: Any) -> str:
        """Message for a call without the null condition."""
        what = "the loop" if pipe is None else type(pipe).__name__
        return (
            f"CFG needs the null condition, but {what} calls the network without one. Call the pipeline with "
            "guidance_scale > 1 (any value: CFG replaces it; Flux: true_cfg_scale > 1 and a negative_prompt), or give "
            "guide(denoiser, ..., null=condition) the null inputs."
        )
