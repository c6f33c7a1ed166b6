"""Levels and layers compared: by what a task needs, by nearness to an encoder; and probes of features."""

from diffusers_repr.sweep.align import measure_alignment
from diffusers_repr.sweep.align_comparison import AlignmentComparison, ComparisonCell
from diffusers_repr.sweep.align_models import compare_alignments
from diffusers_repr.sweep.alignment import Alignment, AlignmentCell
from diffusers_repr.sweep.disentanglement import DCIScore, dci_score
from diffusers_repr.sweep.finetune_probe import FinetuneProtocol, finetune_probe
from diffusers_repr.sweep.measure import Bench, CellScore, Held, Measure, Piece, Split, Tally, register_measure
from diffusers_repr.sweep.pck import PCKMeasure
from diffusers_repr.sweep.probes import FewShotScore, ProbeScore, few_shot_probe, knn_probe, linear_probe
from diffusers_repr.sweep.representation import ProbeSettings, RepresentationScores, measure_representation
from diffusers_repr.sweep.select import select_features
from diffusers_repr.sweep.selection import Selection, SelectionCell
from diffusers_repr.sweep.similarity import CKA, CKNNA, KNNAccuracy, LinearAccuracy
from diffusers_repr.sweep.splits import hold_out
from diffusers_repr.sweep.trained import TrainedHeads

__all__ = [
    "CKA",
    "CKNNA",
    "Alignment",
    "AlignmentCell",
    "AlignmentComparison",
    "Bench",
    "CellScore",
    "ComparisonCell",
    "DCIScore",
    "FewShotScore",
    "FinetuneProtocol",
    "Held",
    "KNNAccuracy",
    "LinearAccuracy",
    "Measure",
    "PCKMeasure",
    "Piece",
    "ProbeScore",
    "ProbeSettings",
    "RepresentationScores",
    "Selection",
    "SelectionCell",
    "Split",
    "Tally",
    "TrainedHeads",
    "compare_alignments",
    "dci_score",
    "few_shot_probe",
    "finetune_probe",
    "hold_out",
    "knn_probe",
    "linear_probe",
    "measure_alignment",
    "measure_representation",
    "register_measure",
    "select_features",
]
