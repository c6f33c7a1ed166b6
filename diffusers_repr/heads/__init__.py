"""From features to predictions: heads, and how they are fitted."""

from diffusers_repr.heads.attention import AttentionHead
from diffusers_repr.heads.base import Head, head_class, list_heads, register_head, unregister_head
from diffusers_repr.heads.convolution import ConvolutionHead
from diffusers_repr.heads.dense.base import MapHead
from diffusers_repr.heads.dense.depth import DepthHead
from diffusers_repr.heads.dense.features import depth_layers, read_features, readout_layers
from diffusers_repr.heads.dense.losses import (
    appearance_triplet_loss,
    correspondence_loss,
    sample_points,
    sobel_edges,
)
from diffusers_repr.heads.dense.readout import ReadoutHead
from diffusers_repr.heads.feedback import FeedbackHead, feedback_pairs
from diffusers_repr.heads.feedback_source import FeedbackExtractor
from diffusers_repr.heads.fitting.fit import FitResult, fit_head
from diffusers_repr.heads.fitting.maps import fit_map_head
from diffusers_repr.heads.fitting.pixels import DDPM_SEG, PixelProtocol, PixelSet, train_members
from diffusers_repr.heads.fitting.protocols import PROTOCOLS, get_protocol
from diffusers_repr.heads.hyperfeature_source import Hyperfeatures
from diffusers_repr.heads.hyperfeatures import HyperfeaturesHead
from diffusers_repr.heads.joint import JointHead
from diffusers_repr.heads.map_classifier import MapClassifier
from diffusers_repr.heads.moved import keep_moved_names
from diffusers_repr.heads.odise import OdiseHead
from diffusers_repr.heads.pixel_ensemble import PixelEnsembleHead
from diffusers_repr.heads.pooled.base import PooledHead
from diffusers_repr.heads.pooled.knn import KNNHead
from diffusers_repr.heads.pooled.linear import LinearHead
from diffusers_repr.heads.pooled.mlp import MLPHead
from diffusers_repr.heads.projector import Projector

keep_moved_names()

__all__ = [
    "DDPM_SEG",
    "PROTOCOLS",
    "AttentionHead",
    "ConvolutionHead",
    "DepthHead",
    "FeedbackExtractor",
    "FeedbackHead",
    "FitResult",
    "Head",
    "Hyperfeatures",
    "HyperfeaturesHead",
    "JointHead",
    "KNNHead",
    "LinearHead",
    "MLPHead",
    "MapClassifier",
    "MapHead",
    "OdiseHead",
    "PixelEnsembleHead",
    "PixelProtocol",
    "PixelSet",
    "PooledHead",
    "Projector",
    "ReadoutHead",
    "appearance_triplet_loss",
    "correspondence_loss",
    "depth_layers",
    "feedback_pairs",
    "fit_head",
    "fit_map_head",
    "get_protocol",
    "head_class",
    "list_heads",
    "read_features",
    "readout_layers",
    "register_head",
    "sample_points",
    "sobel_edges",
    "train_members",
    "unregister_head",
]
