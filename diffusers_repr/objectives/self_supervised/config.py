"""`SelfSupervisedConfig`: the network, the method, and what the method is told; keys of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from transformers import ViTConfig

from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.objectives.self_supervised.barlow_twins import BarlowTwinsObjective
from diffusers_repr.objectives.self_supervised.base import SelfSupervisedObjective
from diffusers_repr.objectives.self_supervised.byol import BYOLObjective
from diffusers_repr.objectives.self_supervised.simclr import SimCLRObjective
from diffusers_repr.objectives.self_supervised.simsiam import SimSiamObjective

METHODS: dict[str, Any] = {
    "simclr": SimCLRObjective,
    "simsiam": SimSiamObjective,
    "byol": BYOLObjective,
    "barlow_twins": BarlowTwinsObjective,
}
# Setting -> argument of the method, and the methods that have it.
_OWN = {
    "temperature": ("temperature", ("simclr",)),
    "prediction_dim": ("prediction_dim", ("simsiam", "byol")),
    "predictor_lr_scale": ("predictor_lr_scale", ("simsiam", "byol")),
    "target_decay": ("decay", ("byol",)),
    "redundancy_weight": ("redundancy_weight", ("barlow_twins",)),
}


@dataclasses.dataclass(frozen=True)
class SelfSupervisedConfig:
    """The network and its loss; the fields are keys of a recipe.

    Raises:
        ValueError: If an argument of the network is missing or unknown, a value is out of range, or a setting is of
            another method and would do nothing.
    """

    model: dict | str | None = setting(None, "arguments of ViTConfig, a mapping (JSON in a flag)")
    method: Literal["simclr", "simsiam", "byol", "barlow_twins"] = setting("simclr", "what is asked of two views")
    projection_dim: int = setting(128, "width of the vectors that the loss compares")
    temperature: float | None = setting(None, "simclr: of the softmax over similarities; default 0.2")
    prediction_dim: int | None = setting(None, "simsiam, byol: hidden width of the predictor; default: the paper's")
    predictor_lr_scale: float | None = setting(None, "simsiam, byol: its learning rate, times the rest's; default 10")
    target_decay: float | None = setting(None, "byol: of the target at first, rising to 1; default 0.99")
    redundancy_weight: float | None = setting(None, "barlow_twins: of correlations of different numbers; 0.005")
    eval_split: str | None = setting(None, "split whose labels measure the result; none: no measurement")

    def __post_init__(self) -> None:
        arguments = json_mapping("model", self.model)
        check_keys("`model`", arguments, ViTConfig().to_dict())
        missing = [key for key in ("image_size", "patch_size", "num_channels") if key not in arguments]
        if missing:
            raise ValueError(f"`model` needs {', '.join(missing)}, as whole numbers.")
        if arguments["image_size"] % arguments["patch_size"]:
            raise ValueError(f"`model` has image_size={arguments['image_size']}, no multiple of its patch_size.")
        for name, (_, methods) in _OWN.items():
            if getattr(self, name) is not None and self.method not in methods:
                raise ValueError(f"`{name}` would do nothing: it is of {' and '.join(methods)}; drop it.")
        for name in ("projection_dim", "temperature", "prediction_dim", "predictor_lr_scale", "redundancy_weight"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.target_decay is not None and not 0 <= self.target_decay <= 1:
            raise ValueError(f"`target_decay` lies in [0, 1], got {self.target_decay}.")
        object.__setattr__(self, "model", arguments)
        take_back(self, "eval_split")

    def build(self, mean: Sequence[float], std: Sequence[float], steps: int | None = None) -> SelfSupervisedObjective:
        """The objective, with random weights.

        Args:
            mean: Of the data in [0, 1], one a channel.
            std: As `mean`.
            steps: Of the run.
        """
        given = {name: getattr(self, key) for key, (name, _) in _OWN.items() if getattr(self, key) is not None}
        if self.method == "byol":
            given["steps"] = steps
        return METHODS[self.method](self.model, mean, std, projection_dim=self.projection_dim, **given)


__all__ = ["METHODS", "SelfSupervisedConfig"]
