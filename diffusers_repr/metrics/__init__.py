"""What a representation is worth: alignment with another one, probes, and distances of sets of samples."""

from diffusers_repr.metrics.cka import cka
from diffusers_repr.metrics.cknna import cknna, compare_graphs, neighbour_graph
from diffusers_repr.metrics.frechet import frechet_distance
from diffusers_repr.metrics.gather import gather_rows, own_rows
from diffusers_repr.metrics.precision_recall import PrecisionRecall, precision_recall
from diffusers_repr.metrics.probes import FewShotScore, ProbeScore, few_shot_probe, knn_probe, linear_probe
from diffusers_repr.metrics.record import MetricRecord, UnlikeRecordsError, compare

__all__ = [
    "FewShotScore",
    "MetricRecord",
    "PrecisionRecall",
    "ProbeScore",
    "UnlikeRecordsError",
    "cka",
    "cknna",
    "compare",
    "compare_graphs",
    "few_shot_probe",
    "frechet_distance",
    "gather_rows",
    "knn_probe",
    "linear_probe",
    "neighbour_graph",
    "own_rows",
    "precision_recall",
]
