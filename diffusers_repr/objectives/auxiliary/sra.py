"""SRA (arXiv 2505.02831): the network learns from a later block of its own moving average, which sees less noise."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.denoiser.hooks import clear_hooks
from diffusers_repr.heads.projector import Projector
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, add_noise
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, LossHost, Observation, full_precision, widen

TEACHER_DEPTH = 20 / 28  # block 20 of SiT-XL


def less_noisy(
    level: NoiseLevel, schedule: NoiseSchedule, most: float, generator: torch.Generator | None = None
) -> NoiseLevel:
    """`t' = clamp(t - most U, 0, 1)` with U uniform in [0, 1], one a sample, t being the time in [0, 1].

    Args:
        level: Resolved.
        schedule: Its process.
        most: Largest step towards the data.
        generator: Of U, on the CPU.

    Raises:
        ValueError: For a schedule without bounded time (EDM, VE).
    """
    low, high = schedule.timestep_range
    if schedule.kind in ("edm", "ve"):
        raise ValueError(f"A {schedule.kind} schedule has no time in [0, 1] that SRA could step back in.")
    time = torch.as_tensor(level.timestep).double()
    shift = torch.rand(time.shape, dtype=torch.float64, generator=generator).to(time.device)
    earlier = (time - most * (high - low) * shift).clamp(low, high)
    return schedule.resolve(earlier.round() if schedule.kind == "vp" else earlier)


class SelfAlignmentLoss(AuxiliaryLoss):
    """Smooth L1 between projected tokens of one block and those of a later block of the moving average.

    The teacher gets the same noise and the same dropped labels at a less noisy time. It runs only up to its block.
    Its weights follow the moving average after every step; they are in no checkpoint, for the average is.

    Settings are those of SiT-XL in the paper's repository: block 8 learns from block 20 of 28. Its weight follows a
    schedule that is fixed in the code; here it is constant, and 0.2 is a choice of ours.

    Args:
        layer: Path of the student's layer; REPA's if None.
        teacher_layer: Path of the teacher's; at 20/28 of the depth if None.
        weight: Of the loss.
        max_shift: t_max, largest step in time towards the data.
        beta: Of the smooth L1.
        projector_dim: Hidden width of the projector; 0 compares the tokens as they are.
    """

    runs_network = True

    def __init__(
        self,
        layer: str | None = None,
        teacher_layer: str | None = None,
        weight: float = 0.2,
        max_shift: float = 0.2,
        beta: float = 0.05,
        projector_dim: int = 2048,
    ) -> None:
        super().__init__("self_alignment", weight)
        if not 0 <= max_shift <= 1 or not beta > 0:
            raise ValueError(f"max_shift lies in [0, 1] and beta is positive; got {max_shift} and {beta}.")
        self.layer, self.teacher_layer = layer, teacher_layer
        self.max_shift, self.beta, self.projector_dim = max_shift, beta, projector_dim
        self.projector: nn.Module | None = None

    def attach(self, host: LossHost) -> None:
        """Find the layers, build the projector, and keep a frozen copy of the network as the teacher."""
        model = host.network
        if self.layer is None:
            (self.layer,) = host.denoiser.default_layers("repa").layers
        if self.teacher_layer is None:
            blocks = host.denoiser.family.stack(model)
            self.teacher_layer = blocks[max(1, round(TEACHER_DEPTH * len(blocks))) - 1]
        student, teacher = host.layer(self.layer), host.layer(self.teacher_layer)
        if student.grid != teacher.grid or (not self.projector_dim and student.channels != teacher.channels):
            raise ValueError(
                f"Self-alignment compares token by token; {self.layer!r} has grid {student.grid} and "
                f"{student.channels} channels, {self.teacher_layer!r} {teacher.grid} and {teacher.channels}."
            )
        if host.denoiser.schedule.kind in ("edm", "ve"):
            less_noisy(host.denoiser.level(1.0), host.denoiser.schedule, 0.0)
        if self.projector_dim:
            self.projector = Projector(student.channels, teacher.channels, self.projector_dim)
        self.layers = (self.layer,)
        # Beside the modules: the teacher and the objective are no parts of the loss.
        self.__dict__["host"] = host
        self.__dict__["teacher"] = host.freeze("self-alignment-teacher", frozen_copy(model))

    def forward(self, seen: Observation) -> Tensor:
        """Mean over samples, tokens and channels."""
        student = seen.layers[self.layers[0]]
        target = self.teacher_tokens(seen)
        values, projector = student.tokens(), self.projector
        if projector is not None:
            values = projector(values.to(floating_dtype(projector)), student.grid)
        with full_precision(values.device):
            return F.smooth_l1_loss(widen(values), widen(target), beta=self.beta)

    @torch.no_grad()
    def teacher_tokens(self, seen: Observation) -> Tensor:
        """Tokens of the teacher's layer for the same images, noise and condition, at a less noisy time."""
        host, noisy = self.__dict__["host"], seen.noisy
        assert self.teacher_layer is not None
        level = less_noisy(noisy.level, host.denoiser.schedule, self.max_shift, noisy.batch.get("generator"))
        x_t = add_noise(noisy.x0, level, noisy.noise)
        inputs = host.denoiser.network_inputs(x_t, level, noisy.condition)
        teacher = self.__dict__["teacher"]
        with capture(teacher, self.teacher_layer) as tape:
            teacher(**inputs)
        return host.layer_tokens(self.teacher_layer, tape[self.teacher_layer], noisy.size).tokens()

    def on_step_end(self, step: int, ema: Any) -> None:
        """Take over the moving average.

        Raises:
            ValueError: If there is none.
        """
        super().on_step_end(step, ema)
        if ema is None:
            raise ValueError("Self-alignment learns from the moving average of the network; do not switch it off.")
        copy_average(ema.shadow, "network.", self.__dict__["teacher"])

    def head_modules(self) -> dict[str, str]:
        """The projector."""
        return {} if self.projector is None else {"projector-self-alignment": "projector"}

    def describe(self) -> dict[str, Any]:
        """With the teacher's layer and the settings."""
        own = {name: getattr(self, name) for name in ("teacher_layer", "max_shift", "beta", "projector_dim")}
        return {**super().describe(), **own}


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a network that nothing hangs on: no hooks, no gradients, eval mode."""
    twin: Any = copy.deepcopy(model)
    clear_hooks(twin)
    if hasattr(twin, "disable_gradient_checkpointing") and getattr(twin, "_supports_gradient_checkpointing", False):
        twin.disable_gradient_checkpointing()
    return twin.eval().requires_grad_(False)


@torch.no_grad()
def copy_average(average: Mapping[str, Tensor], prefix: str, module: nn.Module) -> None:
    """Write the moving average of a network into a frozen copy of it, in place.

    Args:
        average: Names as in the objective's state dict.
        prefix: Of the network in it, with the dot at its end.
        module: The copy; tensors that the average lacks, those that are not trained, stay.

    Raises:
        ValueError: For an average of adapters.
    """
    if any(".lora_" in name for name in average):
        raise ValueError("Self-alignment copies whole weights and cannot follow LoRA adapters; drop one of the two.")
    for name, value in module.state_dict(keep_vars=True).items():
        source = average.get(prefix + name)
        if source is not None:
            source = source.full_tensor() if hasattr(source, "full_tensor") else source  # sharded by FSDP
            value.copy_(source)


__all__ = ["SelfAlignmentLoss", "copy_average", "frozen_copy", "less_noisy"]
