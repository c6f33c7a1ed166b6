"""Guidances as guiders of diffusers' modular pipelines; `Guidance.as_guider` makes them."""

from diffusers_repr.guidance.modular.guider import Guider
from diffusers_repr.guidance.modular.guiders import AutoGuidanceGuider, CFGGuider, PAGGuider

__all__ = ["AutoGuidanceGuider", "CFGGuider", "Guider", "PAGGuider"]
