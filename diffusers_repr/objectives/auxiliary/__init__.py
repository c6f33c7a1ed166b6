"""Losses beside the denoising loss, read in the same forward; they attach to any objective that denoises."""

from diffusers_repr.objectives.auxiliary.alignment import AlignmentLoss, alignment_loss
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, LossHost, Observation
from diffusers_repr.objectives.auxiliary.dispersive import DispersiveLoss
from diffusers_repr.objectives.auxiliary.haste import AttentionAlignmentLoss
from diffusers_repr.objectives.auxiliary.irepa import SpatialAlignmentLoss
from diffusers_repr.objectives.auxiliary.sra import SelfAlignmentLoss

__all__ = [
    "AlignmentLoss",
    "AttentionAlignmentLoss",
    "AuxiliaryLoss",
    "DispersiveLoss",
    "LossHost",
    "Observation",
    "SelfAlignmentLoss",
    "SpatialAlignmentLoss",
    "alignment_loss",
]
