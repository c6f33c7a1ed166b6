"""The parts of ODISE, open-vocabulary panoptic segmentation with a frozen text-to-image model."""

from diffusers_repr.heads.odise.captioner import ImplicitCaptioner
from diffusers_repr.heads.odise.classification import MaskClassifier
from diffusers_repr.heads.odise.head import OdiseHead, OdiseOutput
from diffusers_repr.heads.odise.masks import MaskGenerator
from diffusers_repr.heads.odise.pyramid import FeaturePyramid
from diffusers_repr.heads.odise.vocabulary import TEMPLATE, Vocabulary

__all__ = [
    "TEMPLATE",
    "FeaturePyramid",
    "ImplicitCaptioner",
    "MaskClassifier",
    "MaskGenerator",
    "OdiseHead",
    "OdiseOutput",
    "Vocabulary",
]
