"""One network that denoises and classifies: JDM and HybViT."""

from diffusers_repr.objectives.joint.config import JointConfig, build_joint
from diffusers_repr.objectives.joint.hybvit import HybViTObjective
from diffusers_repr.objectives.joint.jdm import JDMObjective

__all__ = ["HybViTObjective", "JDMObjective", "JointConfig", "build_joint"]
