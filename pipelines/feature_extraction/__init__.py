"""Features of images from the layers of any diffusion pipeline."""

from diffusers_repr.pipelines.feature_extraction.pipeline import FeatureExtractionPipeline

__all__ = ["FeatureExtractionPipeline"]
