"""What features are for: tasks, of which the probe is the first."""

from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.tasks.held_out import ClassifierAccuracy, EncoderAccuracy, ReadoutErrors
from diffusers_repr.tasks.probe import Probe, ProbeOutput
from diffusers_repr.tasks.recipe import ProbeRecipe, Score
from diffusers_repr.tasks.retrieval import RetrievalAccuracy
from diffusers_repr.tasks.task import Task

__all__ = [
    "BaseRecord",
    "ClassifierAccuracy",
    "EncoderAccuracy",
    "Level",
    "Probe",
    "ProbeOutput",
    "ProbeRecipe",
    "ReadoutErrors",
    "RetrievalAccuracy",
    "Score",
    "Task",
]
