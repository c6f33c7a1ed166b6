"""`ReadoutObjective`: heads that read maps out of a frozen denoiser's features, and their losses."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from readout_args import HEADS, ReadoutConfig
from torch import Tensor, nn

from diffusers_repr import Denoiser
from diffusers_repr.heads import (
    appearance_triplet_loss,
    correspondence_loss,
    depth_layers,
    read_features,
    readout_layers,
    sample_points,
)
from diffusers_repr.hub import is_repo_id
from diffusers_repr.hub.places import without_places
from diffusers_repr.objectives import Objective
from diffusers_repr.objectives.base import rebuild, weighted_sum

TERMS = {"spatial": "mse", "depth": "l1", "appearance": "triplet", "correspondence": "cross_entropy"}


class ReadoutObjective(Objective):
    """The heads, by the folder each is saved in, and the sum of their losses; the denoiser is frozen."""

    def __init__(self, config: ReadoutConfig, denoiser: Denoiser, size: tuple[int, int]) -> None:
        super().__init__()
        self.config, self.denoiser, self.size = config, denoiser, size
        denoiser.prompts = {}  # the empty prompt is encoded once
        self.freeze("network", denoiser.model)
        for name, part in denoiser.pipe.components.items():
            if isinstance(part, nn.Module) and part is not denoiser.model:
                self.freeze(name, part)
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

    def head_options(self) -> dict:
        config, (low, high) = self.config, self.denoiser.schedule.timestep_range
        default = [low, low + 0.8 * (high - low)] if config.kind == "depth" else [low, high]
        options = {**config.head, "level_range": config.level_range or default, "label_range": config.label_range}
        if config.kind != "depth":
            options["kind"] = config.kind
        if config.reads_labels:
            options["target"] = config.target
        return options

    def about(self) -> dict:
        config, name = self.config, HEADS[self.config.kind].__name__
        base, (low, high) = config.pretrained_model_name_or_path, self.level_range
        text = f"It reads {config.target if config.reads_labels else config.kind} from the features of "
        text += f"`{without_places(base)}` at timesteps {low:g} to {high:g}, in the layers "
        text += f"{', '.join(f'`{path}`' for path in self.layers)}; `{name}.from_pretrained` of "
        text += "`diffusers_repr.heads` loads it."
        if config.kind == "depth":
            text += " The weak head, on fewer layers, lies in `weak`."
        public = is_repo_id(base) and not Path(base).is_dir()
        return {"kind": f"`{name}`", "text": text, "tags": ["readout-guidance", config.kind],
                "base_model": base if public else None}  # fmt: skip

    # Loss

    def forward(self, batch: dict, phase: str = "main") -> dict[str, Tensor]:
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
    def features(self, images: Tensor, timestep: Tensor, noise: Tensor | None = None) -> tuple[dict, Tensor]:
        """Maps and timesteps of images (K, B, C, H, W), kind after kind, the images of one row at the same level."""
        kinds, count = images.shape[:2]
        level = self.denoiser.level(timestep.expand(count).repeat(kinds))
        x0 = self.denoiser.encode_pixels(images.flatten(0, 1))
        x_t = self.denoiser.add_noise(x0, level, torch.randn_like(x0) if noise is None else noise)
        size = (images.shape[3], images.shape[4])
        condition = self.denoiser.condition(class_labels=self.config.class_label, batch=len(x0), size=size)
        return read_features(self.denoiser, x_t, level, condition, self.layers), level.timestep

    def loss(self, read: Tensor, batch: dict) -> Tensor:
        """That of a readout (K * B, c, h, w)."""
        if self.config.kind == "appearance":
            return appearance_triplet_loss(*read.chunk(3))
        if self.config.kind == "correspondence":
            pairs = zip(read.chunk(2), batch["points"], strict=True)
            first, second = (sample_points(maps, points, self.size) for maps, points in pairs)
            return correspondence_loss(first, second, batch["valid"])
        error = F.l1_loss if self.config.kind == "depth" else F.mse_loss
        return error(read, self.label(batch, read))

    def label(self, batch: dict, read: Tensor) -> Tensor:
        """The label at the size of a readout, averaged over areas."""
        return F.interpolate(batch["label"], tuple(read.shape[2:]), mode="area")

    def term(self, name: str) -> str:
        """What the loss of a head is called in the log."""
        return TERMS[self.config.kind] if name == "head" else f"{name}_{TERMS[self.config.kind]}"

    # What is saved

    def ema_modules(self) -> dict[str, nn.Module]:
        return {f"readouts.{name}": head for name, head in self.readouts.items()}

    def pipeline(self, state: Mapping[str, Tensor]) -> nn.ModuleDict:
        """The heads by themselves."""
        return nn.ModuleDict({name: rebuild(head, state, f"readouts.{name}.") for name, head in self.readouts.items()})

    def save_pretrained(self, folder: str | Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Each head as a folder, the weak one inside the strong one's."""
        for name, head in self.pipeline(state).items():
            nn.Module.to(head, dtype).save_pretrained(Path(folder) / name if name == "weak" else folder)
