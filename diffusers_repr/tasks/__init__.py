"""What features are for: probes."""

from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.tasks.probe import Probe, ProbeOutput
from diffusers_repr.tasks.recipe import ProbeRecipe, Score

__all__ = ["BaseRecord", "Level", "Probe", "ProbeOutput", "ProbeRecipe", "Score"]
