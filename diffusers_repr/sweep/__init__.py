"""Levels and layers compared: by what a task needs, by nearness to an encoder; and probes of features."""

from diffusers_repr.sweep.align import measure_alignment
from diffusers_repr.sweep.alignment_result import Alignment, AlignmentCell
from diffusers_repr.sweep.probes import FewShotScore, ProbeScore, few_shot_probe, knn_probe, linear_probe
from diffusers_repr.sweep.select import select_features
from diffusers_repr.sweep.selection_result import Selection

__all__ = [
    "Alignment",
    "AlignmentCell",
    "FewShotScore",
    "ProbeScore",
    "Selection",
    "few_shot_probe",
    "knn_probe",
    "linear_probe",
    "measure_alignment",
    "select_features",
]
