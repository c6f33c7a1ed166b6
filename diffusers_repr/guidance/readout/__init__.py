"""Guidance by trained heads on maps: `ReadoutGuidance`, and several of them as one step."""

from diffusers_repr.guidance.readout.guidance import ReadoutGuidance
from diffusers_repr.guidance.readout.summed import SummedReadoutGuidance

__all__ = ["ReadoutGuidance", "SummedReadoutGuidance"]
