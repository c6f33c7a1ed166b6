"""SRA (arXiv 2505.02831): the network learns from a later block of its own moving average, which sees less noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.heads.projector import Projector
from diffusers_repr.hub.checks import check_whole
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, add_noise
from diffusers_repr.objectives.auxiliary.base import (
    AuxiliaryLoss,
    LossHost,
    Observation,
    full_precision,
    widen,
    widen_inputs,
)
from diffusers_repr.objectives.auxiliary.self_teacher import SelfTeacher

Distance = Literal["cosine", "token_cosine", "smooth_l1", "l1", "l2"]
XL = 28  # blocks


def less_noisy(
    level: NoiseLevel, schedule: NoiseSchedule, most: float, generator: torch.Generator | None = None
) -> NoiseLevel:
    """`t' = clamp(t - most U, 0, 1)` with U uniform in [0, 1], one a sample, t being the time in [0, 1].

    Whole timesteps (DDPM) go back by a whole number from 0 to below `most` of them all, and not below 1.

    Args:
        level: Resolved.
        schedule: Its process.
        most: Largest step towards the data.
        generator: Of U, on the CPU.

    Raises:
        ValueError: For a schedule without bounded time (EDM, VE).
    """
    if schedule.kind in ("edm", "ve"):
        raise ValueError(f"A {schedule.kind} schedule has no time in [0, 1] that SRA could step back in.")
    low, high = schedule.timestep_range
    time = torch.as_tensor(level.timestep).double()
    shift = torch.rand(time.shape, dtype=torch.float64, generator=generator).to(time.device)
    if schedule.kind == "vp":
        steps = int(most * (high + 1))
        return schedule.resolve((time - (steps * shift).floor()).clamp(low + 1, high))
    return schedule.resolve((time - most * (high - low) * shift).clamp(low, high))


def self_alignment_loss(student: Tensor, teacher: Tensor, distance: Distance = "cosine", beta: float = 0.05) -> Tensor:
    """Mean distance of projected tokens and the teacher's, a scalar.

    Args:
        student: `(B, N, D)`.
        teacher: `(B, N, D)`.
        distance: `cosine`: 1 - cosine over the N tokens, a channel at a time; `token_cosine`: over the D channels, a
            token at a time; `smooth_l1`, `l1`, `l2`: of each number.
        beta: Of the smooth L1.

    Example:
        >>> same = torch.ones(1, 4, 2)
        >>> float(self_alignment_loss(same, 3 * same)), float(self_alignment_loss(same, 3 * same, "l2"))
        (0.0, 4.0)
    """
    with full_precision(student.device):
        student, teacher = widen(student), widen(teacher)
        if distance in ("cosine", "token_cosine"):
            return 1 - F.cosine_similarity(student, teacher, dim=1 if distance == "cosine" else -1).mean()
        if distance == "smooth_l1":
            return F.smooth_l1_loss(student, teacher, beta=beta)
        mean: Callable[[Tensor, Tensor], Tensor] = F.l1_loss if distance == "l1" else F.mse_loss
        return mean(student, teacher)


@dataclasses.dataclass(frozen=True)
class WeightFall:
    """`0.1^((epoch - start) / length)` after the epoch `start`, 1 before: what a weight is multiplied by.

    The defaults are those of SRA's code for ImageNet at 256 px; at 512 px it has 99 and 800.

    Args:
        start: Last epoch, from 0, of the full weight; None: it never falls.
        length: Epochs in which it falls tenfold.
        epoch_steps: Optimizer steps of an epoch; 5004 are those of ImageNet in batches of 256. With 1 `start` and
            `length` count steps.

    Raises:
        ValueError: For numbers below 0, or no length.

    Example:
        >>> fall = WeightFall(start=10, length=100, epoch_steps=1)
        >>> [round(fall.factor(step), 4) for step in (0, 10, 60, 110)]
        [1.0, 1.0, 0.3162, 0.1]
    """

    start: int | None = 149
    length: int = 1000
    epoch_steps: int = 5004

    def __post_init__(self) -> None:
        check_whole("start", 0 if self.start is None else self.start, 0)
        check_whole("length", self.length)
        check_whole("epoch_steps", self.epoch_steps)

    def factor(self, step: int) -> float:
        """What it is in the optimizer step after `step` of them."""
        epoch = step // self.epoch_steps
        return 1.0 if self.start is None or epoch <= self.start else 0.1 ** ((epoch - self.start) / self.length)


class SelfAlignmentLoss(AuxiliaryLoss):
    """Distance between projected tokens of one block and those of a later block of the network's moving average.

    The teacher gets the same noise and the same dropped labels at a less noisy time. It runs only up to its block. It
    is an average of its own, without warm-up, whatever average the run keeps and saves; a checkpoint holds it.

    The defaults are those of SRA's code. For flows (its SiT): the cosine with the weight 0.5, constant. That cosine is
    over the tokens, for each channel: so its code computes it, by the dimension that torch takes if none is named;
    `token_cosine` is the one of REPA. The numbers of its paper are by `smooth_l1` with the weight 0.2, which falls
    (`WeightFall`). For noise in whole timesteps (its DiT): `smooth_l1` with 0.04, which falls too. Blocks, counted
    from 1: 4 learns from 8; of 28 blocks and more (XL) 8 from 20, for whole timesteps 8 from 16. A network of fewer
    than 8 has its blocks at a third and at two thirds of the depth, a choice of ours.

    Args:
        layer: Path of the student's layer.
        teacher_layer: Path of the teacher's.
        weight: Of the loss.
        max_shift: t_max, largest step in time towards the data. DiT's code has 0.1 unless it is told, and its README
            tells 0.2.
        beta: Of the smooth L1.
        projector_dim: Hidden width of the projector, two linear layers with SiLU between; twice the network's if None.
            0 compares the tokens as they are.
        distance: See `self_alignment_loss`.
        fall: How the weight falls; as the code if None: never with a cosine.
        ema_decay: Of the teacher. Short runs want less, or the teacher stays what it was at first.

    Raises:
        ValueError: For numbers out of their ranges, or an unknown distance.
    """

    runs_network = True
    host: LossHost
    teacher: SelfTeacher

    def __init__(
        self,
        layer: str | None = None,
        teacher_layer: str | None = None,
        weight: float | None = None,
        max_shift: float = 0.2,
        beta: float = 0.05,
        projector_dim: int | None = None,
        *,
        distance: Distance | None = None,
        fall: WeightFall | None = None,
        ema_decay: float = 0.9999,
    ) -> None:
        super().__init__("self_alignment", 0.0 if weight is None else weight)
        if not 0 <= max_shift <= 1 or not beta > 0 or not 0 <= ema_decay <= 1:
            raise ValueError(
                "max_shift and ema_decay lie in [0, 1], and beta is positive; got "
                f"{max_shift}, {ema_decay} and {beta}."
            )
        if distance is not None and distance not in get_args(Distance):
            raise ValueError(f"distance is one of {', '.join(get_args(Distance))}; got {distance!r}.")
        self.given, self.layer, self.teacher_layer = weight, layer, teacher_layer
        self.max_shift, self.beta, self.projector_dim, self.ema_decay = max_shift, beta, projector_dim, ema_decay
        self.distance, self.fall = distance, fall
        self.projector: nn.Module | None = None
        self._used = False

    @property
    def current_weight(self) -> float:
        """The weight in the coming step."""
        return self.weight * (1.0 if self.fall is None else self.fall.factor(self.step))

    def attach(self, host: LossHost) -> None:
        """Find the layers, build the projector, and keep a frozen copy of the network as the teacher."""
        whole = host.denoiser.schedule.kind == "vp"
        if host.denoiser.schedule.kind in ("edm", "ve"):
            less_noisy(host.denoiser.level(1.0), host.denoiser.schedule, 0.0)
        self.distance = self.distance or ("smooth_l1" if whole else "cosine")
        cosine = self.distance in ("cosine", "token_cosine")
        if self.given is None:
            self.weight = 0.5 if cosine else 0.04 if whole else 0.2
        if self.fall is None and not cosine:
            self.fall = WeightFall()
        self._choose_layers(host, whole)
        assert self.layer is not None
        assert self.teacher_layer is not None
        student, teacher = host.layer(self.layer), host.layer(self.teacher_layer)
        if student.grid != teacher.grid or (self.projector_dim == 0 and student.channels != teacher.channels):
            raise ValueError(
                f"Self-alignment compares token by token; {self.layer!r} has grid {student.grid} and "
                f"{student.channels} channels, {self.teacher_layer!r} {teacher.grid} and {teacher.channels}."
            )
        if self.projector_dim != 0:
            hidden = self.projector_dim or student.channels + teacher.channels
            self.projector = Projector(student.channels, teacher.channels, hidden, num_layers=2)
        self.layers = (self.layer,)
        self.__dict__["host"] = host  # beside the modules: the objective is no part of the loss
        self.teacher = SelfTeacher(host.network, self.ema_decay)
        host.freeze("self-alignment-teacher", self.teacher.module)

    def _choose_layers(self, host: LossHost, whole: bool) -> None:
        if self.layer is not None and self.teacher_layer is not None:
            return
        blocks = host.denoiser.family.stack(host.network)
        student, teacher = default_blocks(len(blocks), whole)
        self.layer = self.layer or blocks[student - 1]
        self.teacher_layer = self.teacher_layer or blocks[teacher - 1]

    def forward(self, seen: Observation) -> Tensor:
        """Mean over samples, tokens and channels."""
        self._used = True
        student = seen.layers[self.layers[0]]
        target = self.teacher_tokens(seen)
        values, projector = student.tokens(), self.projector
        if projector is not None:
            values = projector(values.to(floating_dtype(projector)), student.grid)
        assert self.distance is not None
        return self_alignment_loss(values, target, self.distance, self.beta)

    @torch.no_grad()
    def teacher_tokens(self, seen: Observation) -> Tensor:
        """Tokens of the teacher's layer for the same images, noise and condition, at a less noisy time."""
        host, noisy, module = self.host, seen.noisy, self.teacher.module
        assert self.teacher_layer is not None
        level = less_noisy(noisy.level, host.denoiser.schedule, self.max_shift, noisy.batch.get("generator"))
        x_t = add_noise(noisy.x0, level, noisy.noise)
        inputs = widen_inputs(host.denoiser.network_inputs(x_t, level, noisy.condition))
        with full_precision(x_t.device), capture(module, self.teacher_layer) as tape:
            module(**inputs)
        return host.layer_tokens(self.teacher_layer, tape[self.teacher_layer], noisy.size).tokens()

    def on_step_end(self, step: int, ema: Any) -> None:
        """Move the teacher on, after a step and not where a run is resumed."""
        super().on_step_end(step, ema)
        if self._used:
            self.teacher.update(self.host.network)
        self._used = False

    def kept_state(self) -> dict[str, Tensor]:
        """The teacher's tensors."""
        return {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}

    def head_modules(self) -> dict[str, str]:
        """The projector."""
        return {} if self.projector is None else {"projector-self-alignment": "projector"}

    def describe(self) -> dict[str, Any]:
        """With the teacher's layer and the settings."""
        names = ("teacher_layer", "max_shift", "beta", "projector_dim", "distance", "ema_decay")
        fall = None if self.fall is None else dataclasses.asdict(self.fall)
        return {**super().describe(), **{name: getattr(self, name) for name in names}, "fall": fall}


def default_blocks(depth: int, whole_timesteps: bool = False) -> tuple[int, int]:
    """Student's and teacher's block of a network of some depth, from 1.

    Example:
        >>> [default_blocks(depth) for depth in (3, 12, 28)], default_blocks(28, whole_timesteps=True)
        ([(1, 2), (4, 8), (8, 20)], (8, 16))
    """
    if depth >= XL:
        return 8, 16 if whole_timesteps else 20
    if depth >= 8:
        return 4, 8
    student = max(1, round(depth / 3))
    return student, min(depth, max(student + 1, round(2 * depth / 3)))


__all__ = ["Distance", "SelfAlignmentLoss", "WeightFall", "default_blocks", "less_noisy", "self_alignment_loss"]
