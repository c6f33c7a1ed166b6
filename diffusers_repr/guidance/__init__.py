"""Guidance on any pipeline: one engine, one file a method."""

from diffusers_repr.guidance.attention.perturbations import Blur, Drop, Identity, Mask
from diffusers_repr.guidance.auto import AutoGuidance
from diffusers_repr.guidance.base import Guidance, GuidanceTerm
from diffusers_repr.guidance.cfg import CFG
from diffusers_repr.guidance.classifier import ClassifierGuidance
from diffusers_repr.guidance.depth import DepthGuidance
from diffusers_repr.guidance.describe import GuidanceDescription, MethodDescription, describe
from diffusers_repr.guidance.energy import EnergyGuidance
from diffusers_repr.guidance.engine.stats import GuidanceStats, StepStats
from diffusers_repr.guidance.guide import GuidanceHandle, guide, is_guided, unguide
from diffusers_repr.guidance.hint import HintGuidance
from diffusers_repr.guidance.modular import AutoGuidanceGuider, CFGGuider, PAGGuider
from diffusers_repr.guidance.pag import PAG
from diffusers_repr.guidance.readout.guidance import ReadoutGuidance
from diffusers_repr.guidance.readout.summed import SummedReadoutGuidance
from diffusers_repr.guidance.sag import SAG
from diffusers_repr.guidance.step import GuidedStep

__all__ = [
    "CFG",
    "PAG",
    "SAG",
    "AutoGuidance",
    "AutoGuidanceGuider",
    "Blur",
    "CFGGuider",
    "ClassifierGuidance",
    "DepthGuidance",
    "Drop",
    "EnergyGuidance",
    "Guidance",
    "GuidanceDescription",
    "GuidanceHandle",
    "GuidanceStats",
    "GuidanceTerm",
    "GuidedStep",
    "HintGuidance",
    "Identity",
    "Mask",
    "MethodDescription",
    "PAGGuider",
    "ReadoutGuidance",
    "StepStats",
    "SummedReadoutGuidance",
    "describe",
    "guide",
    "is_guided",
    "unguide",
]
