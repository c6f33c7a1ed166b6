"""Segmentation learned from scribbles: cross-entropy of the pixels that have a class, and a pairwise regulariser."""

from diffusers_repr.objectives.scribble.objective import (
    ScribbleConfig,
    ScribbleObjective,
    SegmenterConfig,
    Segmenting,
)
from diffusers_repr.objectives.scribble.pairwise import pairwise_energy
from diffusers_repr.objectives.scribble.partial import partial_cross_entropy

__all__ = [
    "ScribbleConfig",
    "ScribbleObjective",
    "SegmenterConfig",
    "Segmenting",
    "pairwise_energy",
    "partial_cross_entropy",
]
