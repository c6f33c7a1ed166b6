"""What features are for: probes, segmentation, correspondence, open-vocabulary segments."""

from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.tasks.correspondence import Correspondence
from diffusers_repr.tasks.denoising_errors.classes import ZeroShotClasses
from diffusers_repr.tasks.denoising_errors.likelihood import CalibratedRacing
from diffusers_repr.tasks.denoising_errors.output import ZeroShotOutput
from diffusers_repr.tasks.denoising_errors.racing import Racing
from diffusers_repr.tasks.denoising_errors.rules import AdaptiveSchedule, Averaging
from diffusers_repr.tasks.held_out import ClassifierAccuracy, EncoderAccuracy, ReadoutErrors
from diffusers_repr.tasks.held_out_features import FeatureRobustness, PairAccuracy
from diffusers_repr.tasks.held_out_panoptic import PanopticAccuracy
from diffusers_repr.tasks.matches import Matches
from diffusers_repr.tasks.panoptic import OpenVocabularySegmenter, PanopticOutput
from diffusers_repr.tasks.probe import Probe, ProbeOutput
from diffusers_repr.tasks.recipe import ProbeRecipe, Score, SegmentationRecipe
from diffusers_repr.tasks.retrieval import RetrievalAccuracy
from diffusers_repr.tasks.segmentation import Segmenter
from diffusers_repr.tasks.segmentation_output import SegmentationOutput
from diffusers_repr.tasks.task import Task
from diffusers_repr.tasks.winoground import WinogroundOutput, winoground
from diffusers_repr.tasks.zero_shot import ZeroShotClassifier

__all__ = [
    "AdaptiveSchedule",
    "Averaging",
    "BaseRecord",
    "CalibratedRacing",
    "ClassifierAccuracy",
    "Correspondence",
    "EncoderAccuracy",
    "FeatureRobustness",
    "Level",
    "Matches",
    "OpenVocabularySegmenter",
    "PairAccuracy",
    "PanopticAccuracy",
    "PanopticOutput",
    "Probe",
    "ProbeOutput",
    "ProbeRecipe",
    "Racing",
    "ReadoutErrors",
    "RetrievalAccuracy",
    "Score",
    "SegmentationOutput",
    "SegmentationRecipe",
    "Segmenter",
    "Task",
    "WinogroundOutput",
    "ZeroShotClasses",
    "ZeroShotClassifier",
    "ZeroShotOutput",
    "winoground",
]
