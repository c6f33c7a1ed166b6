"""DiT with guidance."""

from diffusers_repr.pipelines.guided_dit.pipeline import GuidedDiTPipeline

__all__ = ["GuidedDiTPipeline"]
