"""Images from the neighbours of a picture, a text or nothing: kNN-Diffusion and RDM."""

from diffusers_repr.pipelines.retrieval_diffusion.pipeline import RetrievalDiffusionPipeline

__all__ = ["RetrievalDiffusionPipeline"]
