"""`ProbeConfig`: the settings of a probe whose head is trained by the loop; the fields are keys of a recipe."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import json_mapping, setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.presets import find_preset
from diffusers_repr.heads import MapClassifier
from diffusers_repr.heads.fitting.fit import check_head_options
from diffusers_repr.heads.fitting.protocols import MinibatchProtocol, classifier_class, get_protocol
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig


@dataclasses.dataclass(frozen=True)
class ProbeConfig(FrozenBaseConfig):
    """The frozen base, what is read of it, the head, and how it is trained and measured.

    Raises:
        ValueError: Without a base, and for a head, options, a protocol or a cache that do not fit each other.
    """

    head: str = setting("attention", "linear, mlp, convolution, attention (DifFormer), feedback (DifFeed)")
    head_options: dict | str | None = setting(None, "arguments of the head's class, a mapping (JSON in a flag)")
    preset: str | None = setting(None, "layers, timesteps and pooling of a method: gdc, difformer, diffeed, ...")
    layers: list[str] | None = setting(None, "full module paths")
    timesteps: list[float] | None = setting(None, "training timesteps, each with all layers")
    pooling: str | None = setting(None, "mean, max or adaptive:P of a vector; map:P (default map:16) for maps")
    prompt: str | None = setting(None, "prompt of every image")
    class_label: int | None = setting(None, "condition of a class-conditional base; default: its null class")
    protocol: str | None = setting(
        None, "optimizer, rates, batch and epochs of a method; default: the loop's settings"
    )
    protocol_changes: dict | str | None = setting(None, "other values of the protocol, a mapping (JSON in a flag)")
    feature_cache: str | None = setting(None, "folder of features that are computed once; default: in every step")
    cache_draws: int = setting(1, "draws of noise of each image in feature_cache")
    cache_dtype: Literal["float32", "float16"] = setting("float16", "of the features in feature_cache")
    eval_split: str | None = setting(None, "split to measure on; default, or none: no measurement")

    def __post_init__(self) -> None:
        super().__post_init__()
        cls = classifier_class(self.head)
        if not cls.takes_steps:
            raise ValueError(
                f"{self.head!r} is not trained by gradient steps; fit it by Probe.fit(head={self.head!r})."
            )
        options = json_mapping("head_options", self.head_options)
        check_head_options(self.head, options)
        object.__setattr__(self, "head_options", options)
        object.__setattr__(self, "protocol_changes", json_mapping("protocol_changes", self.protocol_changes))
        take_back(self, "eval_split")
        if self.protocol_changes and self.protocol is None:
            raise ValueError("`protocol_changes` changes a protocol, and none is named; set the loop's settings.")
        if self.preset is None and not (self.layers and self.timesteps):
            raise ValueError("Which features is not said; pass --layers and --timesteps, or --preset.")
        if self.cache_draws < 1:
            raise ValueError(f"`cache_draws` must be at least 1, got {self.cache_draws}.")
        if self.feature_cache is not None and issubclass(cls, MapClassifier) and not cls.reads_once:
            raise ValueError(f"`feature_cache`: {self.head!r} changes what it reads as it learns; drop it.")
        self.steps_of()

    def steps_of(self) -> MinibatchProtocol | None:
        """The protocol with its changes; None: the loop's own settings."""
        if self.protocol is None:
            return None
        found = get_protocol(self.protocol, self.head)
        if not isinstance(found, MinibatchProtocol) or found.standardize or found.batch_norm is not None:
            raise ValueError(
                f"Protocol {found.name!r} needs features that are computed once and standardised; fit it by Probe.fit."
            )
        try:
            return found.replace(**json_mapping("protocol_changes", self.protocol_changes))
        except TypeError as error:
            raise ValueError(f"`protocol_changes`: {error}.") from error

    def reading(self, denoiser: Denoiser) -> dict[str, Any]:
        """`layers`, `timestep` and `pooling` of the extractor: those of the preset, and what is said over them."""
        found = {} if self.preset is None else find_preset(self.preset, denoiser).arguments()
        found = {name: found[name] for name in ("layers", "timestep", "pooling") if name in found}
        on_maps = issubclass(classifier_class(self.head), MapClassifier)
        said = {"layers": self.layers, "timestep": self.timesteps, "pooling": self.pooling}
        found |= {name: value for name, value in said.items() if value is not None}
        if found.get("pooling") is None:
            found["pooling"] = "map:16" if on_maps else "mean"
        return found


__all__ = ["ProbeConfig"]
