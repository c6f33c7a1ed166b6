"""`CleanDIFTObjective`: a copy of a denoiser learns to give of a clean image the features of noisy ones."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.capture.persistent import PersistentCapture
from diffusers_repr.config.recipe import setting
from diffusers_repr.denoiser import Condition, Denoiser
from diffusers_repr.denoiser.family import Family, floating_dtype
from diffusers_repr.features.cleandift import RECORD, TIMESTEP, cleandift_layers
from diffusers_repr.hub.compiled import is_compiled_in_place
from diffusers_repr.models.feature_adapters import FeatureAdapters
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, add_noise
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact, RecordArtifact, State
from diffusers_repr.objectives.base import Batch, weighted_sum
from diffusers_repr.objectives.cosine import mean_cosine
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.reached import reached_parameters

Alignment = Literal["cosine", "mse", "l1"]


@dataclasses.dataclass(frozen=True)
class CleanDIFTConfig:
    """The base, the layers and how they are aligned.

    Raises:
        ValueError: If a number is out of range.
    """

    pretrained_model_name_or_path: str | None = setting(None, "pipeline folder or Hub id of the base that is tuned")
    revision: str | None = setting(None, "branch, tag or commit of the base on the Hub")
    layers: list[str] | None = setting(None, "full module paths; default: those of the paper, of a U-Net")
    levels: int = setting(3, "noisy images of each image in a step, one in each stratum of the timesteps")
    timestep: float = setting(TIMESTEP, "that the tuned network is told")
    learn_timestep: bool = setting(False, "train it too; in the paper's code it is declared learnable and cannot move")
    timestep_lr_scale: float = setting(1e4, "learning rate of the timestep, times that of the weights")
    alignment: Alignment = setting("cosine", "cosine, mse or l1, mean over positions, summed over layers")
    adapter_depth: int = setting(3, "blocks of an adapter")
    adapter_expansion: float = setting(1.0, "width of their gated layers, times the channels")
    time_width: int = setting(256, "values of the vector that modulates the adapters")
    condition_dropout: float = setting(0.0, "share of captions or labels that become null; 1: none are needed")

    def __post_init__(self) -> None:
        if self.levels < 1 or self.adapter_depth < 1 or not self.adapter_expansion > 0:
            raise ValueError(
                f"`levels` and `adapter_depth` are 1 or more, `adapter_expansion` is positive; got {self.levels}, "
                f"{self.adapter_depth} and {self.adapter_expansion}."
            )
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"`condition_dropout` is a share, got {self.condition_dropout}.")
        if not self.timestep_lr_scale > 0:
            raise ValueError(f"`timestep_lr_scale` must be positive, got {self.timestep_lr_scale}.")


def strata_timesteps(draws: Tensor, schedule: NoiseSchedule) -> Tensor:
    """One timestep in each of K equal parts of the range: `low + (u_k + k) / K (high - low)`, k from 0.

    Args:
        draws: u, `(B, K)` in [0, 1).
        schedule: The noise process. Whole timesteps from 1 to T - 2 for `vp`, as in CleanDIFT; of flows from 1 to
            T - 1; of others their whole range.

    Returns:
        `(B, K)` float64; row by row from less to more noise.

    Example:
        >>> strata_timesteps(torch.zeros(1, 3), NoiseSchedule("flow", "velocity"))[0].round(decimals=1).tolist()
        [1.0, 333.7, 666.3]
    """
    low, high = schedule.timestep_range
    if schedule.kind == "vp":
        low, high = 1.0, float(schedule.num_train_timesteps - 1)
    elif schedule.kind in ("flow", "cosine_flow"):
        low, high = 1.0, high - 1
    levels = draws.shape[1]
    times = low + (draws.double().cpu() + torch.arange(levels)) / levels * (high - low)
    return times.floor() if schedule.kind == "vp" else times


class CleanDIFTObjective(DiffusionObjective):
    """CleanDIFT (arXiv 2412.03439): `-sum over layers of mean cos(A_l(g_l; t_k), f_l(x_{t_k}, t_k))`.

    f are features of the frozen base at K timesteps, one in each stratum; g those of the tuned copy of the clean
    image, told one timestep for all: the copy runs once a step, for it sees nothing of k, and its features go through
    the adapters A at all K at once. It stops after the last layer (compiled it runs to its end); what lies behind is
    not trained. The adapters are the identity at first and are not needed afterwards.

    Args:
        denoiser: From `Denoiser.from_pipe(pipe)`: the copy is saved as this pipeline.
        config: Layers, levels, adapters.

    Raises:
        ValueError: For layers that do not exist or give no image, and a timestep that the process does not have.
    """

    discarded = ("tau",)
    own_losses = ("loss",)

    def __init__(self, denoiser: Denoiser, config: CleanDIFTConfig) -> None:
        super().__init__(denoiser, label_dropout=config.condition_dropout)
        self.config, network = config, self.network
        self.layers = cleandift_layers(network) if config.layers is None else list(config.layers)
        channels = [self.layer(path).channels for path in self.layers]
        denoiser.level(config.timestep)  # is there such a timestep?
        if config.learn_timestep and type(denoiser.family).timestep is not Family.timestep:
            raise ValueError(
                f"{type(denoiser.family).__name__} tells its network another number than the timestep, through which "
                "no gradient is passed; set learn_timestep to False."
            )
        self.teacher = copy.copy(denoiser)
        self.teacher.model = self.freeze("teacher", copy.deepcopy(network))
        reached = reached_parameters(denoiser, self.layers)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name in reached)
        self.reads = PersistentCapture(network, self.layers)  # what a network that is compiled later is read by
        self.adapters = FeatureAdapters(
            self.layers, channels, config.adapter_depth, config.adapter_expansion, config.time_width,
            3 * config.time_width, timestep_range=list(denoiser.schedule.timestep_range),
        )  # fmt: skip
        if config.learn_timestep:
            self.tau = nn.Parameter(torch.tensor(float(config.timestep)))
        name = type(network).__name__
        text = f"Its `{name}` gives features of clean images, without noise (CleanDIFT, arXiv 2412.03439): "
        text += '`cleandift_extractor("{folder}")` of `diffusers_repr.features` reads them. It no longer denoises.'
        tags = ["diffusers", "feature-extraction", "cleandift"]
        self.card = {**self.card, "kind": "feature extractor", "text": text, "tags": tags,
                     "pipeline_tag": "image-feature-extraction"}  # fmt: skip

    # Loss

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss; `time` (B, K), in timesteps, and `noise` (B, K, ...) of a batch are taken, not drawn."""
        x0, generator = self.clean(batch), batch.get("generator")
        count, levels = len(x0), self.config.levels
        time = batch.get("time")
        if time is None:
            time = strata_timesteps(torch.rand(count, levels, generator=generator), self.denoiser.schedule)
        noise = batch.get("noise")
        if noise is None:
            noise = torch.randn(count, time.shape[1], *x0.shape[1:], device=x0.device, generator=generator)
        condition = self.condition(batch, count)
        targets = self.noisy_features(x0, time, noise, condition)
        features = self.clean_features(x0, condition)
        m = self.adapters.modulation(time.to(x0.device))
        terms = {
            path: self.distance(self.adapters.adapt(path, features[path], m), targets[path]) for path in self.layers
        }
        return weighted_sum(terms, {})

    def distance(self, ours: Tensor, target: Tensor) -> Tensor:
        """Of one layer, `(B, K, N, C)` each: minus the mean cosine over channels, or the mean error."""
        if self.config.alignment == "cosine":
            return -mean_cosine(ours, target)
        error = F.mse_loss if self.config.alignment == "mse" else F.l1_loss
        return error(ours, target.to(ours.dtype))

    @torch.no_grad()
    def noisy_features(
        self, x0: Tensor, time: Tensor, noise: Tensor, condition: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Features of the frozen base, layer -> `(B, K, N, C)`.

        Args:
            x0: `(B, C, h, w)`.
            time: Timesteps `(B, K)`.
            noise: `(B, K, C, h, w)`.
            condition: Network inputs for the B samples.
        """
        count, levels = time.shape
        level = self.denoiser.level(time.flatten()).to(x0.device)
        x_t = add_noise(x0.repeat_interleave(levels, 0), level, noise.flatten(0, 1).to(x0.device))
        index = torch.arange(count)
        rows = Condition(condition, count, index, self.denoiser.family.unbatched).take(index.repeat_interleave(levels))
        with self.teacher.evaluating():
            found = self._read(self.teacher, x_t, level, rows)
        return {path: tokens.unflatten(0, (count, levels)) for path, tokens in found.items()}

    def clean_features(self, x0: Tensor, condition: Mapping[str, Any]) -> dict[str, Tensor]:
        """Features of the tuned network of clean images, layer -> `(B, N, C)`."""
        return self._read_clean(self.denoiser, x0, condition, getattr(self, "tau", None))

    def _read_clean(
        self, denoiser: Denoiser, x0: Tensor, condition: Mapping[str, Any], tau: Tensor | None = None
    ) -> dict[str, Tensor]:
        level = denoiser.schedule.clean_level(self.config.timestep)
        return self._read(denoiser, level.alpha * x0, level, condition, tau)

    def _read(
        self, denoiser: Denoiser, x: Tensor, level: NoiseLevel, condition: Mapping[str, Any], tau: Tensor | None = None
    ) -> dict[str, Tensor]:
        network = denoiser.model
        inputs = denoiser.network_inputs(x.to(floating_dtype(network)), level, condition)
        if tau is not None:  # as it is: rounded, or cast to the network's dtype, it would not move
            inputs[denoiser.family.timestep_name] = tau.expand(len(x))
        found: Mapping[str, Tensor]
        if network is self.network and is_compiled_in_place(network):
            with self.reads.recording() as found:
                network(**inputs)
        else:
            # A forward that is broken off inside of a checkpointed block cannot be computed again.
            whole = getattr(network, "is_gradient_checkpointing", False) and torch.is_grad_enabled()
            with capture(network, self.layers, stop_early=not whole) as tape:
                network(**inputs)
            found = tape.features
        size = tuple(x.shape[2:])
        return {path: denoiser.feature_map(path, found[path], size).tokens() for path in self.layers}

    # What is trained and saved

    def param_groups(self, phase: str = "main") -> list[dict[str, Any]]:
        """Weights and adapters; the timestep by itself, with a rate at which float32 can tell its steps apart."""
        weights = [p for name, p in self.named_parameters() if p.requires_grad and name != "tau"]
        groups: list[dict[str, Any]] = [{"params": weights}]
        if self.config.learn_timestep:
            groups.append({"params": [self.tau], "lr_scale": self.config.timestep_lr_scale, "weight_decay": 0.0})
        return groups

    def identity(self) -> dict[str, Any]:
        """With the layers and the timestep."""
        return {**super().identity(), "layers": self.layers, "timestep": self.config.timestep}

    def record(self, state: State) -> dict[str, Any]:
        """`cleandift.json`: layers, timestep and base, by which `cleandift_extractor` reads the result."""
        told = float(state["tau"]) if self.config.learn_timestep else self.config.timestep
        base = self.denoiser.name
        base = None if base is None or Path(base).is_absolute() else base
        return {"layers": self.layers, "timestep": told, "base": base}

    def artifacts(self) -> list[Artifact]:
        """The pipeline with the tuned network, the adapters, and what tells the layers and the timestep."""
        adapters = ModelArtifact(self.adapters, "adapters", folder="heads/adapters")
        return [*super().artifacts(), adapters, RecordArtifact(self.record, RECORD)]

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """None: the result does not sample.

        Raises:
            ValueError: Always; set `eval_batch_size` to 0.
        """
        raise ValueError("What CleanDIFT tunes no longer denoises, so there are no samples; set eval_batch_size to 0.")


def noise_robustness(
    objective: CleanDIFTObjective, network: nn.Module, images: Tensor, time: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """How near features are to what noise leaves of them: cosine to the mean of the base's features over noise draws.

    Args:
        objective: Tells base and layers, and has the adapters.
        network: The tuned one, as in `objective` or a saved one.
        images: `(B, C, H, W)` in [-1, 1].
        time: Timesteps `(K,)` at which the base is read.
        noise: `(M + 1, B, C, h, w)`: M draws of the mean, and a further one.

    Returns:
        Each `(layers,)`, the mean cosine to the mean of M draws over timesteps and positions: `clean`, of the tuned
        network's clean features; `adapted`, of these through the adapters; `noisy`, of the base's features with the
        further draw.
    """
    tuned = copy.copy(objective.denoiser)
    tuned.model = network
    found: dict[str, list[Tensor]] = {"clean": [], "adapted": [], "noisy": []}
    with torch.no_grad(), tuned.evaluating():
        x0 = objective.denoiser.encode_pixels(images).float()
        condition = objective.denoiser.condition(batch=len(x0), size=(images.shape[2], images.shape[3])).kwargs()
        clean = objective._read_clean(tuned, x0, condition)
        for t in time.tolist():
            draws = [
                objective.noisy_features(x0, torch.full((len(x0), 1), t), draw[:, None], condition) for draw in noise
            ]
            adapted = objective.adapters(clean, torch.full((len(x0),), t, device=x0.device))
            rows = {"clean": clean, "adapted": adapted, "noisy": {k: v[:, 0] for k, v in draws[-1].items()}}
            means = {path: torch.stack([draw[path][:, 0].float() for draw in draws[:-1]]).mean(0) for path in clean}
            for name, row in rows.items():
                found[name].append(torch.stack([mean_cosine(row[path].float(), means[path]) for path in clean]))
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


__all__ = [
    "CleanDIFTConfig",
    "CleanDIFTObjective",
    "noise_robustness",
    "strata_timesteps",
]
