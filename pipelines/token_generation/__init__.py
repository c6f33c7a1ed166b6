"""Generation of visual tokens."""

from diffusers_repr.pipelines.token_generation.pipeline import TokenGenerationOutput, TokenGenerationPipeline

__all__ = ["TokenGenerationOutput", "TokenGenerationPipeline"]
