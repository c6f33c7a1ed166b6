"""Stable Diffusion with guidance."""

from diffusers_repr.pipelines.guided_stable_diffusion.pipeline import GuidedStableDiffusionPipeline

__all__ = ["GuidedStableDiffusionPipeline"]
