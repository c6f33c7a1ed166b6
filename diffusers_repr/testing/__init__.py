"""Contracts of the extension points, as functions: what each asks of a class of yours, checked on a small model."""

from diffusers_repr.testing.assigner import check_assigner
from diffusers_repr.testing.conditioner import check_conditioner
from diffusers_repr.testing.encoder import check_encoder
from diffusers_repr.testing.family import FamilyReport, check_family
from diffusers_repr.testing.guidance import check_guidance
from diffusers_repr.testing.head import check_head
from diffusers_repr.testing.objective import check_auxiliary_loss, check_objective, tiny_denoiser
from diffusers_repr.testing.task import check_task

__all__ = [
    "FamilyReport",
    "check_assigner",
    "check_auxiliary_loss",
    "check_conditioner",
    "check_encoder",
    "check_family",
    "check_guidance",
    "check_head",
    "check_objective",
    "check_task",
    "tiny_denoiser",
]
