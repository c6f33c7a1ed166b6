"""Masks of images from a few annotated ones, by the features of any diffusion pipeline."""

from diffusers_repr.pipelines.few_shot_segmentation.pipeline import FewShotSegmentationPipeline

__all__ = ["FewShotSegmentationPipeline"]
