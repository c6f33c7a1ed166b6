"""`JointConfig`: the settings of JDM and HybViT, which are keys of a recipe, and the objective they build."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Literal

from diffusers import DDPMScheduler, UNet2DModel

from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import JointHead
from diffusers_repr.models import JointViTModel
from diffusers_repr.objectives.joint.hybvit import HybViTObjective
from diffusers_repr.objectives.joint.jdm import JDMObjective

NETWORKS = {"jdm": UNet2DModel, "hybvit": JointViTModel}
DEFAULTS = ("classification_weight", "generation_weight", "loss", "label_smoothing")


@dataclasses.dataclass(frozen=True)
class JointConfig:
    """What is trained, and how both losses come together.

    Raises:
        ValueError: If an argument of network, head or scheduler is unknown, or one that the data decide.
    """

    method: Literal["jdm", "hybvit"] = setting("jdm", "a UNet2DModel with a head, or a JointViTModel")
    model: dict | str | None = setting(None, "arguments of the network, a mapping")
    head: dict | str | None = setting(None, "jdm: arguments of JointHead, a mapping")
    scheduler: dict | str | None = setting(None, "arguments of the DDPMScheduler, a mapping")
    image_channels: int = setting(3, "1 (grey) or 3 (RGB)")
    classification_weight: float | None = setting(None, "of the cross-entropy; default: jdm 0.001, hybvit 1")
    generation_weight: float | None = setting(None, "of the denoising loss; default: jdm 1, hybvit 100")
    loss: str | None = setting(None, "of denoising, l1 or l2; default: jdm l2, hybvit l1")
    label_smoothing: float | None = setting(None, "of the targets; default: jdm 0, hybvit 0.1")
    classify: Literal["clean", "noised", "both"] = setting("clean", "what the classifier learns from")
    mixup: float = setting(0.0, "Beta(a, a) mixing of the images to be classified; 0: none")
    view_flip: bool = setting(False, "mirror half of the images to be classified, on top of the data's augmentation")
    view_rotation: float = setting(0.0, "turn them by up to so many degrees")
    view_shift: float = setting(0.0, "move them by up to this share of their side")
    view_scale: float = setting(0.0, "shrink or enlarge them by up to this share")

    def __post_init__(self) -> None:
        kinds = {"model": NETWORKS[self.method], "head": JointHead, "scheduler": DDPMScheduler}
        given: set[str] = set()
        for name, kind in kinds.items():
            arguments = json_mapping(name, getattr(self, name))
            given |= set() if name == "scheduler" else set(arguments)
            check_keys(f"`{name}`", arguments, inspect.signature(kind.__init__).parameters)
            object.__setattr__(self, name, arguments)
        if self.head and self.method != "jdm":
            raise ValueError("`head` is of jdm; a JointViTModel brings its own.")
        named = sorted({"num_classes", "id2label"} & given)
        if named:
            raise ValueError(f"The data decide on {' and '.join(named)} of the network; drop it from the recipe.")

    def settings(self) -> dict[str, Any]:
        """Arguments of the objective; those left out are the method's own."""
        given = {name: getattr(self, name) for name in DEFAULTS if getattr(self, name) is not None}
        views = {name: getattr(self, f"view_{name}") for name in ("flip", "rotation", "shift", "scale")}
        return {**given, **views, "classify": self.classify, "mixup": self.mixup}


def build_joint(denoiser: Denoiser, head: JointHead | None, config: JointConfig) -> JDMObjective | HybViTObjective:
    """The objective of a network, with the head of a JDM."""
    if head is None:
        return HybViTObjective(denoiser, **config.settings())
    return JDMObjective(denoiser, head, **config.settings())
