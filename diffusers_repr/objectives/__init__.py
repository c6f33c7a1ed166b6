"""Training methods: each an `Objective`, one module with everything it trains, that `train` runs."""

from diffusers_repr.objectives.alignment import AlignmentTerm, alignment_loss
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.diffusion import DiffusionObjective, NoisyBatch
from diffusers_repr.objectives.dispersive import DispersiveTerm
from diffusers_repr.objectives.haste import AttentionAlignmentTerm
from diffusers_repr.objectives.irepa import IREPA
from diffusers_repr.objectives.reg import REGObjective
from diffusers_repr.objectives.repa import REPAObjective
from diffusers_repr.objectives.repa_config import REPAConfig, build_repa
from diffusers_repr.objectives.repa_e import REPAEObjective
from diffusers_repr.objectives.saved_heads import load_heads
from diffusers_repr.objectives.sra import SelfAlignmentTerm
from diffusers_repr.objectives.teachers import CachedFeatures
from diffusers_repr.objectives.terms import AuxiliaryLoss
from diffusers_repr.objectives.times import TimeSampler

__all__ = [
    "IREPA",
    "AlignmentTerm",
    "AttentionAlignmentTerm",
    "AuxiliaryLoss",
    "Batch",
    "CachedFeatures",
    "DiffusionObjective",
    "DispersiveTerm",
    "NoisyBatch",
    "Objective",
    "REGObjective",
    "REPAConfig",
    "REPAEObjective",
    "REPAObjective",
    "SelfAlignmentTerm",
    "TimeSampler",
    "alignment_loss",
    "build_repa",
    "load_heads",
    "weighted_sum",
]
