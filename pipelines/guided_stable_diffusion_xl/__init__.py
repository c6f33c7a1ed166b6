"""Stable Diffusion XL with guidance."""

from diffusers_repr.pipelines.guided_stable_diffusion_xl.pipeline import GuidedStableDiffusionXLPipeline

__all__ = ["GuidedStableDiffusionXLPipeline"]
