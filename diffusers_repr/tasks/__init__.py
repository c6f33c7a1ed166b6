"""What features are for: tasks, of which the probe is the first, and segmentation the second."""

from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.tasks.held_out import ClassifierAccuracy, EncoderAccuracy, ReadoutErrors
from diffusers_repr.tasks.held_out_features import FeatureRobustness, PairAccuracy
from diffusers_repr.tasks.held_out_panoptic import PanopticAccuracy
from diffusers_repr.tasks.panoptic import OpenVocabularySegmenter, PanopticOutput
from diffusers_repr.tasks.probe import Probe, ProbeOutput
from diffusers_repr.tasks.recipe import ProbeRecipe, Score, SegmentationRecipe
from diffusers_repr.tasks.retrieval import RetrievalAccuracy
from diffusers_repr.tasks.segmentation import Segmenter
from diffusers_repr.tasks.segmentation_output import SegmentationOutput
from diffusers_repr.tasks.task import Task

__all__ = [
    "BaseRecord",
    "ClassifierAccuracy",
    "EncoderAccuracy",
    "FeatureRobustness",
    "Level",
    "OpenVocabularySegmenter",
    "PairAccuracy",
    "PanopticAccuracy",
    "PanopticOutput",
    "Probe",
    "ProbeOutput",
    "ProbeRecipe",
    "ReadoutErrors",
    "RetrievalAccuracy",
    "Score",
    "SegmentationOutput",
    "SegmentationRecipe",
    "Segmenter",
    "Task",
]
