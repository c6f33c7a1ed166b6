"""What a representation is worth: alignment with another one, and distances of sets of samples."""

from diffusers_repr.metrics.alignment_uniformity import AlignmentUniformity, alignment_uniformity
from diffusers_repr.metrics.auroc import AttributeDifference, area_under_roc, total_auroc_difference
from diffusers_repr.metrics.cka import cka
from diffusers_repr.metrics.cknna import cknna, compare_graphs, neighbour_graph
from diffusers_repr.metrics.clusters import normalized_mutual_information, purity
from diffusers_repr.metrics.dci import ImportanceScores, importance_scores
from diffusers_repr.metrics.encoding import Encoded, encode_images
from diffusers_repr.metrics.frechet import frechet_distance
from diffusers_repr.metrics.gather import gather_rows, own_rows
from diffusers_repr.metrics.generation import measure_generation
from diffusers_repr.metrics.miou import ConfusionMatrix, mean_iou
from diffusers_repr.metrics.panoptic import PanopticScores, panoptic_quality
from diffusers_repr.metrics.panoptic_inference import panoptic_inference, semantic_inference
from diffusers_repr.metrics.precision_recall import PrecisionRecall, precision_recall
from diffusers_repr.metrics.reconstruction import feature_distance, reconstruction_errors
from diffusers_repr.metrics.record import MetricRecord, UnlikeRecordsError, compare
from diffusers_repr.metrics.ssim import ssim, ssim_map
from diffusers_repr.metrics.uncertainty import EnsembleSums, certain_rows, image_scores, jensen_shannon

__all__ = [
    "AlignmentUniformity",
    "AttributeDifference",
    "ConfusionMatrix",
    "Encoded",
    "EnsembleSums",
    "ImportanceScores",
    "MetricRecord",
    "PanopticScores",
    "PrecisionRecall",
    "UnlikeRecordsError",
    "alignment_uniformity",
    "area_under_roc",
    "certain_rows",
    "cka",
    "cknna",
    "compare",
    "compare_graphs",
    "encode_images",
    "feature_distance",
    "frechet_distance",
    "gather_rows",
    "image_scores",
    "importance_scores",
    "jensen_shannon",
    "mean_iou",
    "measure_generation",
    "neighbour_graph",
    "normalized_mutual_information",
    "own_rows",
    "panoptic_inference",
    "panoptic_quality",
    "precision_recall",
    "purity",
    "reconstruction_errors",
    "semantic_inference",
    "ssim",
    "ssim_map",
    "total_auroc_difference",
]
