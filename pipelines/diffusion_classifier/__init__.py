"""Classes of images by the denoising errors of any conditional diffusion pipeline."""

from diffusers_repr.pipelines.diffusion_classifier.pipeline import DiffusionClassifierPipeline

__all__ = ["DiffusionClassifierPipeline"]
