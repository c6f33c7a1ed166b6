"""From a representation to a condition: the assignment `c = f(z)` of self-supervised guidance."""

from diffusers_repr.assign.base import Assigner, assigner_class, list_assigners, register_assigner
from diffusers_repr.assign.classifier import ClassifierAssigner
from diffusers_repr.assign.identity import IdentityAssigner, standardize_vectors
from diffusers_repr.assign.index import RetrievalIndex
from diffusers_repr.assign.kmeans import KMeansAssigner
from diffusers_repr.assign.neighbours import NeighboursAssigner
from diffusers_repr.assign.retrieval_prior import FrequencyPrior
from diffusers_repr.assign.sinkhorn import SinkhornAssigner, clustering_loss, sinkhorn_knopp

__all__ = [
    "Assigner",
    "ClassifierAssigner",
    "FrequencyPrior",
    "IdentityAssigner",
    "KMeansAssigner",
    "NeighboursAssigner",
    "RetrievalIndex",
    "SinkhornAssigner",
    "assigner_class",
    "clustering_loss",
    "list_assigners",
    "register_assigner",
    "sinkhorn_knopp",
    "standardize_vectors",
]
