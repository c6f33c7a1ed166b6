"""Online guidance (arXiv 2312.08825): a diffusion model that clusters its own features and is conditioned on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from diffusers_repr.assign import SinkhornAssigner
from diffusers_repr.capture import capture
from diffusers_repr.denoiser import (
    Denoiser,
    HistogramPrior,
    LabelConditioner,
    MapConditioner,
    Prior,
    StoredPrior,
    VectorConditioner,
)
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.hub.compiled import is_compiled_in_place
from diffusers_repr.noise import NoiseLevel, add_noise
from diffusers_repr.objectives.artifacts import Artifact, ModelArtifact, PipelineArtifact, State
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss
from diffusers_repr.objectives.auxiliary.clustering import ClusteringLoss, summary_tokens
from diffusers_repr.objectives.base import Batch
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.noisy import NoisyBatch

_KEPT = 512  # conditions in a stored prior
_FORGET = 0.99  # a step, of how often prototypes are taken


class OnlineGuidanceObjective(DiffusionObjective):
    """The denoising loss, and clusters of the network's own features that it is conditioned on in a second stage.

    In the first stage every condition is null, and `ClusteringLoss` trains the assigner on a layer of the network. At
    the switch the moving average becomes the weights. From then on the average, without gradient and only up to that
    layer, sees each batch at a little noise without a condition, and what its assigner gives is the condition of the
    training step. Both losses go on.

    What the network is conditioned on tells what it is told of the prototype: its id (`LabelConditioner`, as many
    classes as prototypes), the prototype (`VectorConditioner`), or a map with the prototype of each patch
    (`MapConditioner`, as many channels as a prototype has). The saved folder is a plain pipeline with the averaged
    `assigner` beside it, and `prior.json`, from which `pipe(batch_size=8)` draws conditions.

    Other than the paper's code: one learned null for both stages (the code has two), which prototypes are taken is
    known from training and kept as the prior (the code takes conditions from training images), and patches lose their
    condition together.

    Args:
        denoiser: As `DiffusionObjective`. The class token of a network with one is what is clustered, else the mean of
            the image's tokens.
        assigner: Of as many features as the layer has channels.
        switch_step: Optimizer steps of the first stage.
        layer: The middle block if None.
        weight: Of the clustering loss; it grows to this through the first stage.
        window: Share of the time, 0 the data and 1 the noise, between which noise levels count for the clustering.
        encode_time: At which the moving average sees a batch.
        detach: Whether the clustering loss leaves the network alone, as the paper's code; False trains it too.
        losses: Further auxiliary losses.
        label_dropout: Share of the samples whose condition is null in the second stage.
        **options: As `DiffusionObjective`.

    Raises:
        ValueError: For a network or an assigner that do not fit together, and numbers out of range.
    """

    usage: Tensor
    recent: Tensor
    seen_maps: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        assigner: SinkhornAssigner,
        switch_step: int,
        layer: str | None = None,
        *,
        weight: float = 1.0,
        window: tuple[float, float] = (0.1, 0.2),
        encode_time: float = 0.15,
        detach: bool = True,
        losses: Sequence[AuxiliaryLoss] = (),
        label_dropout: float = 0.15,
        **options: Any,
    ) -> None:
        check_whole("switch_step", switch_step)
        if not 0 <= encode_time <= 1:
            raise ValueError(f"encode_time is a share of the time, 0 the data and 1 the noise; got {encode_time}.")
        self._check_condition(denoiser, assigner)
        patches = isinstance(denoiser.conditioner, MapConditioner)
        clustering = ClusteringLoss(
            layer or middle_layer(denoiser), weight, window=window, warmup_steps=switch_step, detach=detach,
            patches=patches,
        )  # fmt: skip
        super().__init__(denoiser, losses=[clustering, *losses], label_dropout=label_dropout, **options)
        self.switch_step, self.encode_time, self.patches = switch_step, encode_time, patches
        self.steps = 0
        self._ema: Any = None
        channels = self.layer(clustering.layers[0]).channels
        if assigner.in_features != channels:
            raise ValueError(
                f"Layer {clustering.layers[0]!r} has {channels} channels, the assigner takes {assigner.in_features}."
            )
        self.assigner = assigner.train().requires_grad_(True)
        clustering.__dict__["assigner"] = assigner  # a submodule of the objective alone
        self.register_buffer("usage", torch.zeros(assigner.config["num_prototypes"]))
        if patches:
            grid = self.layer(clustering.layers[0]).grid
            self.register_buffer("recent", torch.zeros(_KEPT, *grid, dtype=torch.long))
            self.register_buffer("seen_maps", torch.zeros((), dtype=torch.long))

    @staticmethod
    def _check_condition(denoiser: Denoiser, assigner: SinkhornAssigner) -> None:
        conditioner, config = denoiser.conditioner, assigner.config
        width = config["embed_dim"] or assigner.in_features
        name = type(denoiser.model).__name__
        wanted: dict[str, tuple[Any, int]]
        if isinstance(conditioner, LabelConditioner):
            wanted = {"classes": (conditioner.num_classes, config["num_prototypes"])}
        elif isinstance(conditioner, VectorConditioner | MapConditioner):
            wanted = {"channels of the condition": (conditioner.channels(), width)}
        else:
            raise ValueError(f"Online guidance conditions on classes, vectors or maps, {name} on {conditioner.kind}.")
        for what, (found, needed) in wanted.items():
            if found != needed:
                raise ValueError(f"{name} has {found} {what}; the assigner's prototypes make {needed}.")

    @property
    def clustering(self) -> ClusteringLoss:
        """The loss of the assigner."""
        return self.losses.each["clustering"]  # type: ignore[return-value]

    @property
    def conditions_now(self) -> bool:
        """Whether the second stage has begun."""
        return self.steps >= self.switch_step

    # One step

    def condition(self, batch: Batch, count: int, drop: bool = True) -> dict[str, Any]:
        """The null condition: what there is before the network was asked."""
        return self.conditioner.null(count)

    def noised(self, batch: Batch, x0: Tensor | None = None, drop: bool = True) -> NoisyBatch:
        """As `DiffusionObjective.noised`; in the second stage with the condition that the moving average gives."""
        if is_compiled_in_place(self.network):
            raise ValueError(
                "Online guidance stops its network at a layer, which a compiled one cannot; do not compile."
            )
        noisy = super().noised(batch, x0, drop)
        if not self.conditions_now:
            return noisy
        ids = self.assigned(noisy)
        if self.training:
            self._count(ids)
        values = self.values(ids, noisy.size)
        chance = self.label_dropout if drop else 0.0
        dropped = self.conditioner.draw_dropped(values, chance, batch.get("generator"))
        return replace(noisy, condition=self.conditioner.inputs(values, dropped))

    @torch.no_grad()
    def assigned(self, noisy: NoisyBatch) -> Tensor:
        """Ids of the prototypes of a batch, `(B,)` or of patches `(B, h, w)`, by the moving average.

        Args:
            noisy: Its images and noise are taken, at `encode_time`.

        Raises:
            RuntimeError: Without a moving average, which `train` brings after each step.
        """
        if self._ema is None:
            raise RuntimeError("The second stage asks the moving average, and there is none yet: call on_step_end.")
        level = self.encode_level(len(noisy.x0), noisy.x0.device)
        x_t = add_noise(noisy.x0, level, noisy.noise)
        inputs = self.denoiser.network_inputs(x_t, level, self.conditioner.null(len(x_t)))
        path = self.clustering.layers[0]
        with eval_mode(self.network, self.assigner):
            with capture(self.network, path) as tape:
                functional_call(self.network, self._averages("network"), kwargs=inputs)
            found = self.layer_tokens(path, tape[path], noisy.size)
            tokens = summary_tokens(found, self.denoiser.family, self.patches)
            rows = tokens.flatten(0, -2).float()
            scores = functional_call(self.assigner, self._averages("assigner"), (rows,), {"assign": False})
        ids = scores.argmax(1)
        return ids.unflatten(0, (len(x_t), *found.grid)) if self.patches else ids

    def encode_level(self, count: int, device: torch.device) -> NoiseLevel:
        """The level at which the moving average sees images."""
        schedule = self.denoiser.schedule
        low, high = schedule.timestep_range
        time = low + self.encode_time * (high - low)
        time = round(time) if schedule.kind == "vp" else time
        return schedule.resolve(torch.full((count,), float(time), dtype=torch.float64)).to(device)

    def _averages(self, path: str) -> dict[str, Tensor]:
        """Averaged tensors in the dtypes of the network's own."""
        own = dict(self.get_submodule(path).state_dict(keep_vars=True))
        means = {k.removeprefix(f"{path}."): v for k, v in self._ema.shadow.items() if k.startswith(f"{path}.")}
        return {name: mean.to(own[name].dtype) for name, mean in means.items()}

    def values(self, ids: Tensor, size: tuple[int, int]) -> Tensor:
        """What the conditioner takes of prototypes.

        Args:
            ids: As `assigned`.
            size: (H, W) of x_0.
        """
        if isinstance(self.conditioner, LabelConditioner):
            return ids
        prototypes = self._averages("assigner")["prototypes"] if self._ema is not None else self.assigner.prototypes
        return prototype_values(prototypes.detach(), ids, size if self.patches else None)

    @torch.no_grad()
    def _count(self, ids: Tensor) -> None:
        counts = torch.bincount(ids.flatten(), minlength=len(self.usage)).to(self.usage)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        self.usage.mul_(_FORGET).add_(counts)
        if self.patches:
            rows = (self.seen_maps + torch.arange(len(ids), device=ids.device)) % _KEPT
            self.recent[rows] = ids
            self.seen_maps += len(ids)

    @torch.no_grad()
    def on_step_end(self, step: int, ema: Any) -> None:
        """Count the step; at the switch the moving average becomes the weights."""
        super().on_step_end(step, ema)
        if any(hasattr(mean, "full_tensor") for mean in ema.shadow.values()):
            raise ValueError("Online guidance asks the moving average, which no process has whole under FSDP.")
        self.steps, self._ema = step, ema
        if step == self.switch_step:
            own = self.state_dict()
            for name, mean in ema.shadow.items():
                mean.copy_(own[name])
            self.assigner.fitted.fill_(True)

    # The result

    def artifacts(self) -> list[Artifact]:
        """The pipeline with its prior, and the assigner."""
        _, *rest = super().artifacts()
        pipe = _DrawingPipeline(self.denoiser.pipe, self.trained_components(), self)
        return [pipe, *rest, ModelArtifact(self.assigner, "assigner", folder="assigner")]

    def prior(self, state: Mapping[str, Tensor] | None = None) -> Prior:
        """Conditions as often as they were taken of late.

        Args:
            state: Of the objective; its own if None.
        """
        state = self.state_dict() if state is None else state
        usage = state["usage"].double().cpu()
        usage = usage if bool(usage.sum() > 0) else torch.ones_like(usage)
        if isinstance(self.conditioner, LabelConditioner):
            return HistogramPrior(usage)
        prototypes = state["assigner.prototypes"].detach().float().cpu()
        if self.patches:
            seen = max(1, min(_KEPT, int(state["seen_maps"])))
            return StoredPrior(prototype_values(prototypes, state["recent"][:seen].cpu(), self.denoiser.family.size()))
        return StoredPrior(prototype_values(prototypes, rows_by_share(usage, _KEPT), None))

    def preview(self, pipe: Any, count: int, generator: torch.Generator, steps: int) -> list[Any]:
        """Samples in rows of 8 of the prototypes that are taken most, or of a map; free ones in the first stage."""
        if not self.conditions_now and isinstance(self.conditioner, LabelConditioner):
            null = [self.conditioner.null_label] * count
            return self.previewing(pipe)(class_labels=null, generator=generator, num_inference_steps=steps).images
        if not self.conditions_now:
            return pipe(batch_size=count, generator=generator, num_inference_steps=steps).images
        if self.patches:
            maps = self.prior().draw(-(-count // 8), generator).repeat_interleave(8, dim=0)[:count]
            return pipe(condition=maps, generator=generator, num_inference_steps=steps).images
        often = self.usage.argsort(descending=True).cpu()
        ids = often[torch.arange(count) // 8 % len(often)]
        if isinstance(self.conditioner, LabelConditioner):
            given: dict[str, Any] = {"class_labels": ids.tolist()}
        else:
            given = {"condition": self.values(ids.to(self.usage.device), (1, 1)).cpu()}
        return self.previewing(pipe)(**given, generator=generator, num_inference_steps=steps).images

    def preview_labels(self, count: int) -> None:
        """None: the names of the data's classes are not those of prototypes."""

    def identity(self) -> dict[str, Any]:
        """With the assigner and the settings of the stages."""
        own = {
            "assigner": {k: v for k, v in self.assigner.config.items() if not k.startswith("_")},
            "switch_step": self.switch_step,
            "encode_time": self.encode_time,
        }
        return {**super().identity(), "online": own}

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """What encoders need must be there; the data's own conditions are not read."""
        self.check_encoders(batch)

    def check_data(self, data: Any) -> None:
        """Any data will do."""


@dataclass(frozen=True)
class _DrawingPipeline(PipelineArtifact):
    """A pipeline that draws its conditions, in the second stage.

    Attributes:
        objective: Which gives the prior.
    """

    objective: OnlineGuidanceObjective

    def build(self, state: State) -> Any:
        """See `Artifact`."""
        pipe = super().build(state)
        if self.objective.conditions_now:
            pipe.stored_prior = self.objective.prior(state)
        return pipe


def middle_layer(denoiser: Denoiser) -> str:
    """The block in the middle of a transformer, or the middle block of a U-Net."""
    blocks = denoiser.family.blocks(denoiser.model)
    return blocks[len(blocks) // 2] if blocks else "mid_block"


def prototype_values(prototypes: Tensor, ids: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Prototypes of length 1 by their ids: vectors `(B, E)`, or maps `(B, E, H, W)` of `size` from `(B, h, w)`."""
    values = F.normalize(prototypes.float(), dim=1)[ids]
    if size is None:
        return values
    return F.interpolate(values.permute(0, 3, 1, 2), size, mode="nearest")


def rows_by_share(usage: Tensor, count: int) -> Tensor:
    """Ids `(count,)`, each as often as its share says, by largest remainders.

    Example:
        >>> rows_by_share(torch.tensor([3.0, 0.0, 1.0]), 4)
        tensor([0, 0, 0, 2])
    """
    wanted = usage / usage.sum() * count
    whole = wanted.floor()
    left = count - int(whole.sum())
    whole[(wanted - whole).argsort(descending=True, stable=True)[:left]] += 1
    return torch.repeat_interleave(torch.arange(len(usage)), whole.long())


__all__ = ["OnlineGuidanceObjective", "middle_layer"]
