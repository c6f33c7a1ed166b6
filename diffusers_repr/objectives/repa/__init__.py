"""REPA and the methods that share its parts: REG, REPA-E, and the recipe of them all."""

from diffusers_repr.objectives.repa.config import REPAConfig, build_repa
from diffusers_repr.objectives.repa.objective import REPAObjective
from diffusers_repr.objectives.repa.reg import REGObjective
from diffusers_repr.objectives.repa.repa_e import REPAEObjective

__all__ = ["REGObjective", "REPAConfig", "REPAEObjective", "REPAObjective", "build_repa"]
