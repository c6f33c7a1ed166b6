"""Guidance by trained heads on maps: `ReadoutGuidance`."""

from diffusers_repr.guidance.readout.guidance import ReadoutGuidance

__all__ = ["ReadoutGuidance"]
