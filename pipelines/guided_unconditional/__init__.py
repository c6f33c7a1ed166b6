"""DDPM and DDIM models, class-conditional ones too, with guidance."""

from diffusers_repr.pipelines.guided_unconditional.pipeline import GuidedUnconditionalPipeline

__all__ = ["GuidedUnconditionalPipeline"]
