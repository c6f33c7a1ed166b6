"""From features to predictions: heads, and how they are fitted."""

from diffusers_repr.heads.base import Head
from diffusers_repr.heads.fit import FitResult, fit_head
from diffusers_repr.heads.knn import KNNHead
from diffusers_repr.heads.linear import LinearHead
from diffusers_repr.heads.mlp import MLPHead
from diffusers_repr.heads.protocols import PROTOCOLS, get_protocol

__all__ = [
    "PROTOCOLS",
    "FitResult",
    "Head",
    "KNNHead",
    "LinearHead",
    "MLPHead",
    "fit_head",
    "get_protocol",
]
