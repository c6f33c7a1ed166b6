"""What features are for: probes, segmentation, correspondence, open-vocabulary segments."""

from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.tasks.autoencoder_errors import AutoencoderErrors
from diffusers_repr.tasks.compare_heads import HEADS, HeadPlaces, compare_heads
from diffusers_repr.tasks.correspondence import Correspondence
from diffusers_repr.tasks.denoising_errors.classes import ZeroShotClasses
from diffusers_repr.tasks.denoising_errors.likelihood import CalibratedRacing
from diffusers_repr.tasks.denoising_errors.output import ZeroShotOutput
from diffusers_repr.tasks.denoising_errors.racing import Racing
from diffusers_repr.tasks.denoising_errors.rules import AdaptiveSchedule, Averaging
from diffusers_repr.tasks.finetuned import FinetunedAccuracy, finetuned_probe
from diffusers_repr.tasks.head_scores import HeadComparison, HeadScore
from diffusers_repr.tasks.held_out import ClassifierAccuracy, EncoderAccuracy, ReadoutErrors
from diffusers_repr.tasks.held_out_features import FeatureRobustness, PairAccuracy
from diffusers_repr.tasks.held_out_panoptic import PanopticAccuracy
from diffusers_repr.tasks.held_out_selection import SelectedStep
from diffusers_repr.tasks.held_out_students import StudentAccuracy, TunedAccuracy
from diffusers_repr.tasks.hint_errors import HintErrors
from diffusers_repr.tasks.matches import Matches
from diffusers_repr.tasks.noise_curve import NoiseCurve, noise_curve
from diffusers_repr.tasks.panoptic import OpenVocabularySegmenter
from diffusers_repr.tasks.panoptic_output import PanopticOutput
from diffusers_repr.tasks.panoptic_recipe import PanopticRecipe
from diffusers_repr.tasks.pixel_iou import PixelIoU
from diffusers_repr.tasks.probe import Probe, ProbeOutput
from diffusers_repr.tasks.probe_training import ProbeAccuracy, ProbeTraining, prepare_probe
from diffusers_repr.tasks.recipe import ProbeRecipe, Score, SegmentationRecipe
from diffusers_repr.tasks.reconstruction import measure_reconstruction
from diffusers_repr.tasks.representation import RepresentationProbe
from diffusers_repr.tasks.retrieval import RetrievalAccuracy
from diffusers_repr.tasks.segmentation import Segmenter
from diffusers_repr.tasks.segmentation_output import SegmentationOutput
from diffusers_repr.tasks.task import Task
from diffusers_repr.tasks.winoground import WinogroundOutput, winoground
from diffusers_repr.tasks.zero_shot import ZeroShotClassifier

__all__ = [
    "HEADS",
    "AdaptiveSchedule",
    "AutoencoderErrors",
    "Averaging",
    "BaseRecord",
    "CalibratedRacing",
    "ClassifierAccuracy",
    "Correspondence",
    "EncoderAccuracy",
    "FeatureRobustness",
    "FinetunedAccuracy",
    "HeadComparison",
    "HeadPlaces",
    "HeadScore",
    "HintErrors",
    "Level",
    "Matches",
    "NoiseCurve",
    "OpenVocabularySegmenter",
    "PairAccuracy",
    "PanopticAccuracy",
    "PanopticOutput",
    "PanopticRecipe",
    "PixelIoU",
    "Probe",
    "ProbeAccuracy",
    "ProbeOutput",
    "ProbeRecipe",
    "ProbeTraining",
    "Racing",
    "ReadoutErrors",
    "RepresentationProbe",
    "RetrievalAccuracy",
    "Score",
    "SegmentationOutput",
    "SegmentationRecipe",
    "Segmenter",
    "SelectedStep",
    "StudentAccuracy",
    "Task",
    "TunedAccuracy",
    "WinogroundOutput",
    "ZeroShotClasses",
    "ZeroShotClassifier",
    "ZeroShotOutput",
    "compare_heads",
    "finetuned_probe",
    "measure_reconstruction",
    "noise_curve",
    "prepare_probe",
    "winoground",
]
