"""From a representation to a condition: the assignment `c = f(z)` of self-supervised guidance."""

from diffusers_repr.assign.base import Assigner, assigner_class, list_assigners, register_assigner
from diffusers_repr.assign.identity import IdentityAssigner, standardize_vectors

__all__ = [
    "Assigner",
    "IdentityAssigner",
    "assigner_class",
    "list_assigners",
    "register_assigner",
    "standardize_vectors",
]
