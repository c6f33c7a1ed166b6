"""Segments of images under any names, by a text-to-image pipeline and a head that was trained on it."""

from diffusers_repr.pipelines.open_vocabulary_segmentation.pipeline import OpenVocabularySegmentationPipeline

__all__ = ["OpenVocabularySegmentationPipeline"]
