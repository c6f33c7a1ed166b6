"""`ReadoutObjective`: heads that read maps out of a frozen denoiser's features, and their losses."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.heads import (
    DepthHead,
    MapHead,
    ReadoutHead,
    appearance_triplet_loss,
    correspondence_loss,
    depth_layers,
    read_features,
    readout_layers,
    sample_points,
)
from diffusers_repr.hub.places import without_places
from diffusers_repr.objectives.artifacts import ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig

TERMS = {"spatial": "mse", "depth": "l1", "appearance": "triplet", "correspondence": "cross_entropy"}
HEADS: dict[str, type[MapHead]] = {
    "spatial": ReadoutHead,
    "depth": DepthHead,
    "appearance": ReadoutHead,
    "correspondence": ReadoutHead,
}
# Arguments of a head that base and data decide.
GIVEN = ("layers", "channels", "kind", "target", "level_range", "label_range", "timestep_range", "base_model",
         "base_class", "base_config", "base_fingerprint", "noise_kind", "noise_fingerprint")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ReadoutConfig(FrozenBaseConfig):
    """The frozen base, the head and its levels."""

    class_label: int | None = setting(None, "null class of a base whose config tells none")
    kind: Literal["spatial", "depth", "appearance", "correspondence"] = setting("spatial", "what is read")
    target: str = setting("edges", "edges (computed from the images), or what --label_column shows")
    head: dict | str | None = setting(
        None, "widths: arguments of ReadoutHead or DepthHead, a mapping (JSON in a flag)"
    )
    layers: list[str] | None = setting(None, "full module paths; default: the paper's")
    weak_layers: list[str] | None = setting(None, "of the weak depth head, which is trained beside it")
    label_range: list[float] | None = setting(None, "black and white of the label column, as numbers; default: -1 1")
    level_range: list[float] | None = setting(None, "timesteps to train at; default: all, of depth the lower 80 %%")
    eval_split: str | None = setting(None, "split to measure spatial and depth heads on; none: no measurement")

    def __post_init__(self) -> None:
        super().__post_init__()
        take_back(self, "eval_split")
        arguments = json_mapping("head", self.head)
        allowed = [name for name in inspect.signature(HEADS[self.kind].__init__).parameters if name not in GIVEN]
        check_keys("`head`", arguments, allowed)
        object.__setattr__(self, "head", arguments)
        if self.label_range is None:
            object.__setattr__(self, "label_range", [-1.0, 1.0])
        for name in ("label_range", "level_range"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not value[0] < value[1]):
                raise ValueError(f"`{name}` must be low and high with low < high, got {value}.")
        if self.weak_layers is not None and self.kind != "depth":
            raise ValueError(f"`weak_layers` is for kind: depth, got kind: {self.kind}.")
        if self.eval_split is not None and not self.reads_labels:
            raise ValueError(f"`eval_split` compares with labels, and kind: {self.kind} has none; drop it.")

    @property
    def reads_labels(self) -> bool:
        """Whether the head reads a map that an image can be labelled with."""
        return self.kind in ("spatial", "depth")


class ReadoutObjective(Objective):
    """The loss of a readout head, or the sum of those of a strong and a weak depth head; the denoiser is frozen.

    A batch has `images` (K, B, C, H, W) in [-1, 1], kind after kind (of a triplet, of a pair), and `label`
    (B, c, H, W) or `points` (one tensor (B, P, 2) of [y, x] an image) and `valid` (B, P).

    Args:
        denoiser: The base, from a pipeline.
        size: (H, W) of the images.
        config: The heads, and what they read.
    """

    def __init__(self, denoiser: Denoiser, size: tuple[int, int], config: ReadoutConfig) -> None:
        super().__init__()
        require_images(denoiser, "Readout heads")
        self.config, self.denoiser, self.size = config, denoiser, size
        self.freeze_base(denoiser)
        if config.kind == "depth":
            strong, weak = depth_layers(denoiser.model)
            layers = {"strong": config.layers or strong, "weak": config.weak_layers or weak}
        else:
            layers = {"head": config.layers or readout_layers(denoiser.model)}
        make, options = HEADS[config.kind].for_base, self.head_options()
        self.readouts = nn.ModuleDict({k: make(denoiser, v, size, **options) for k, v in layers.items()})
        self.layers = list(dict.fromkeys(path for paths in layers.values() for path in paths))
        self.level_range = tuple(options["level_range"])
        self.card = self.about()

    def head_options(self) -> dict[str, Any]:
        """Arguments of the heads, their layers aside."""
        config, (low, high) = self.config, self.denoiser.schedule.timestep_range
        default = [low, low + 0.8 * (high - low)] if config.kind == "depth" else [low, high]
        options = {
            **json_mapping("head", config.head),
            "level_range": config.level_range or default,
            "label_range": config.label_range,
        }
        if config.kind != "depth":
            options["kind"] = config.kind
        if config.reads_labels:
            options["target"] = config.target
        return options

    def about(self) -> dict[str, Any]:
        """What the card tells."""
        config, name = self.config, HEADS[self.config.kind].__name__
        base, (low, high) = str(config.pretrained_model_name_or_path), self.level_range
        text = f"It reads {config.target if config.reads_labels else config.kind} from the features of "
        text += f"`{without_places(base)}` at timesteps {low:g} to {high:g}, in the layers "
        text += f"{', '.join(f'`{path}`' for path in self.layers)}; `{name}.from_pretrained` of "
        text += "`diffusers_repr.heads` loads it."
        if config.kind == "depth":
            text += " The weak head, on fewer layers, lies in `weak`."
        return {"kind": f"`{name}`", "text": text, "tags": ["readout-guidance", config.kind],
                "base_model": config.public_base}  # fmt: skip

    # Loss

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """A batch of `ReadoutRows`; its `time` (B,), in timesteps, and `noise` are taken instead of drawn ones."""
        timestep = batch["time"] if "time" in batch else self.draw_timesteps(batch["images"].shape[1])
        features, timestep = self.features(batch["images"], timestep, batch.get("noise"))
        terms = {self.term(name): self.loss(head(features, timestep), batch) for name, head in self.readouts.items()}
        return weighted_sum(terms, {}) if len(terms) > 1 else {"loss": next(iter(terms.values()))}

    def draw_timesteps(self, count: int) -> Tensor:
        """One a sample, uniform over the level range; whole ones where the process has steps."""
        low, high = self.level_range
        if self.denoiser.schedule.kind == "vp":
            return torch.randint(math.ceil(low), math.floor(high) + 1, (count,))
        return low + (high - low) * torch.rand(count)

    @torch.no_grad()
    def features(
        self, images: Tensor, timestep: Tensor, noise: Tensor | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Maps and timesteps of images (K, B, C, H, W), kind after kind, the images of one row at the same level."""
        kinds, count = images.shape[:2]
        level = self.denoiser.level(timestep.expand(count).repeat(kinds))
        x0 = self.denoiser.encode_pixels(images.flatten(0, 1))
        x_t = self.denoiser.add_noise(x0, level, torch.randn_like(x0) if noise is None else noise)
        size = (images.shape[3], images.shape[4])
        condition = self.denoiser.condition(class_labels=self.config.class_label, batch=len(x0), size=size)
        return read_features(self.denoiser, x_t, level, condition, self.layers), level.timestep

    def loss(self, read: Tensor, batch: Batch) -> Tensor:
        """That of a readout (K * B, c, h, w)."""
        if self.config.kind == "appearance":
            return appearance_triplet_loss(*read.chunk(3))  # type: ignore[arg-type]
        if self.config.kind == "correspondence":
            pairs = zip(read.chunk(2), batch["points"], strict=True)
            first, second = (sample_points(maps, points, self.size) for maps, points in pairs)
            return correspondence_loss(first, second, batch["valid"])
        error = F.l1_loss if self.config.kind == "depth" else F.mse_loss
        return error(read, self.label(batch, read))

    def label(self, batch: Batch, read: Tensor) -> Tensor:
        """The label at the size of a readout, averaged over areas."""
        return F.interpolate(batch["label"], tuple(read.shape[2:]), mode="area")

    def term(self, name: str) -> str:
        """What the loss of a head is called in the log."""
        return TERMS[self.config.kind] if name == "head" else f"{name}_{TERMS[self.config.kind]}"

    # What is saved

    def artifacts(self) -> Sequence[ModelArtifact]:
        """The head as the folder itself, the weak one inside."""
        return [
            ModelArtifact(head, f"readouts.{name}", folder="weak" if name == "weak" else "")
            for name, head in self.readouts.items()
        ]

    def result(self, state: Mapping[str, Tensor]) -> nn.ModuleDict:
        """The heads, by name."""
        return nn.ModuleDict({part.path.removeprefix("readouts."): part.build(state) for part in self.artifacts()})


__all__ = ["ReadoutConfig", "ReadoutObjective"]
