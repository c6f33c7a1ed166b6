"""Encoders trained without labels, by two views of each image: SimCLR, SimSiam, BYOL, Barlow Twins."""

from diffusers_repr.objectives.self_supervised.barlow_twins import BarlowTwinsObjective
from diffusers_repr.objectives.self_supervised.base import SelfSupervisedObjective
from diffusers_repr.objectives.self_supervised.byol import BYOLObjective
from diffusers_repr.objectives.self_supervised.config import SelfSupervisedConfig
from diffusers_repr.objectives.self_supervised.simclr import SimCLRObjective
from diffusers_repr.objectives.self_supervised.simsiam import SimSiamObjective

__all__ = [
    "BYOLObjective",
    "BarlowTwinsObjective",
    "SelfSupervisedConfig",
    "SelfSupervisedObjective",
    "SimCLRObjective",
    "SimSiamObjective",
]
