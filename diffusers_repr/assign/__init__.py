"""From a representation to a condition: the assignment `c = f(z)` of self-supervised guidance."""

from diffusers_repr.assign.base import Assigner, assigner_class, list_assigners, register_assigner
from diffusers_repr.assign.identity import IdentityAssigner
from diffusers_repr.assign.sinkhorn import SinkhornAssigner, clustering_loss, sinkhorn_knopp

__all__ = [
    "Assigner",
    "IdentityAssigner",
    "SinkhornAssigner",
    "assigner_class",
    "clustering_loss",
    "list_assigners",
    "register_assigner",
    "sinkhorn_knopp",
]
