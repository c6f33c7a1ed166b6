"""Matches between two images by the features of any diffusion pipeline."""

from diffusers_repr.pipelines.correspondence.pipeline import CorrespondencePipeline

__all__ = ["CorrespondencePipeline"]
