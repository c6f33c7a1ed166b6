"""`Run`: everything a training step changes, and how it is kept in a checkpoint."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_repr.objectives import Objective
from diffusers_repr.training.checkpoints import (
    CheckpointError,
    check_same_tensors,
    read_state,
    read_tensors,
    save_checkpoint,
)
from diffusers_repr.training.config import TrainingConfig
from diffusers_repr.training.ema import EMA
from diffusers_repr.training.seeds import learning_rate, reseed
from diffusers_repr.training.sharding import prepare_sharding
from diffusers_repr.training.tensors import full, is_sharded, put
from diffusers_repr.training.update import Update

MAX_SKIPPED_IN_A_ROW = 50


def end_processes(accelerator: Accelerator) -> None:
    """End the process group after the models that it wrapped; the caller keeps none of them.

    A wrapped model that outlives its group destroys it with Python locked: torch then waits for gloo's threads, and
    one of these may wait for Python.

    Args:
        accelerator: The run's; what it prepared is of no use afterwards.
    """
    accelerator.free_memory()
    gc.collect()  # accelerate collects before it lets go of its own references
    accelerator.end_training()


@dataclasses.dataclass
class Progress:
    """Where a run stands, as a checkpoint keeps it.

    Attributes:
        step: Optimizer steps, the skipped ones included.
        skipped: Steps whose loss or gradient was not finite.
        skipped_in_a_row: Of these, the last ones without a break.
        sums: Logged name -> sum since the last line of the log, over steps and processes.
        counts: Logged name -> terms in its sum: a term that is not finite, or is not there in a step, is left out.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)


class Run:
    """The objective as prepared, its optimizers and moving average, and the position.

    Args:
        objective: On the CPU.
        config: The loop's settings.
        accelerator: The run's.
        identity: What decides the weights, kept in each checkpoint.

    Attributes:
        objective: The objective itself.
        model: What accelerate made of it; what is called.
        updates: Phase -> `Update`.
        ema: The moving average.
        progress: The position; what lies on the device is settled by `settle`.
    """

    def __init__(
        self, objective: Objective, config: TrainingConfig, accelerator: Accelerator, identity: Mapping[str, Any]
    ) -> None:
        self.objective, self.config, self.accelerator = objective, config, accelerator
        self.identity, self.progress = dict(identity), Progress()
        optimizers = [make_optimizer(objective.param_groups(phase), config) for phase in objective.phases]
        prepare_sharding(objective, accelerator)
        self.model, *prepared = accelerator.prepare(objective.train(), *optimizers)
        for module in objective.frozen.values():
            module.to(accelerator.device)
        norm = config.max_grad_norm or None
        self.updates = {
            phase: Update(accelerator, optimizer, norm)
            for phase, optimizer in zip(objective.phases, prepared, strict=True)
        }
        self.names = {id(p): name for name, p in objective.named_parameters()}
        self.ema = EMA(objective, config.ema_max_decay, config.ema_warmup)
        self._logged: list[str] = []  # names of what `_sums` adds up
        self._sums = torch.zeros(2, 0)  # and how many terms each has
        self._skipped = torch.zeros(2, dtype=torch.long)  # in all, and in a row

    # One step

    def step(self, micro_batches: list[dict[str, Any]], prepare: Any) -> None:
        """One optimizer step of every phase over the micro-batches of this process.

        Args:
            micro_batches: On the device, as the data gave them.
            prepare: `TrainData.on_device`.
        """
        config, accelerator, progress = self.config, self.accelerator, self.progress
        reseed(config.seed, progress.step, accelerator.process_index)
        lr = learning_rate(config, progress.step)
        batches = [prepare(batch) for batch in micro_batches]
        logged: dict[str, Tensor] = {}
        finite = torch.ones((), dtype=torch.bool)
        for place, phase in enumerate(self.objective.phases):
            losses = []
            for number, batch in enumerate(batches):
                last = number == len(batches) - 1
                with accelerator.no_sync(self.model) if not last else nullcontext():
                    with accelerator.autocast():  # FSDP2 has none of its own
                        out = self.model({**batch, "micro": number}, phase=phase)
                    accelerator.backward(out["loss"] / len(batches))
                losses.append({name: value.detach().float() for name, value in out.items()})
            means = {name: torch.stack([part[name] for part in losses]).mean() for name in losses[0]}
            averages = self.ema if place == len(self.objective.phases) - 1 else None
            norm, took_place = self.updates[phase].step(lr, means["loss"], averages)
            if len(self.objective.phases) > 1:  # what this phase's loss gave to parameters of another
                self.objective.zero_grad(set_to_none=True)
            finite = took_place if place == 0 else finite & took_place
            prefix = "" if len(self.objective.phases) == 1 else f"{phase}_"
            logged |= {f"{prefix}{name}": value for name, value in means.items()}
            logged[f"{prefix}grad_norm"] = norm.float()
        progress.step += 1
        self._count(logged, finite)
        self.objective.on_step_end(progress.step, self.ema)

    def _count(self, logged: dict[str, Tensor], finite: Tensor) -> None:
        """Add up on the device; nothing is read back."""
        values = torch.stack(list(logged.values())).double()
        finite = finite.to(values.device)
        if list(logged) != self._logged:
            self.settle()
            self._logged, self._sums = list(logged), values.new_zeros(2, len(values))
        counted = finite & values.isfinite()
        self._sums += torch.stack([torch.where(counted, values, 0.0), counted.double()])
        self._skipped = self._skipped.to(values.device)
        self._skipped += ~finite
        self._skipped[1] *= ~finite

    def settle(self) -> None:
        """Read what lies on the device into `progress`; every process must call it.

        Raises:
            FloatingPointError: If too many steps in a row, or all of a short run, were not finite.
        """
        progress = self.progress
        if self._logged:
            sums, counts = self.accelerator.reduce(self._sums, "sum").tolist()
            for name, value, count in zip(self._logged, sums, counts, strict=True):
                progress.sums[name] = progress.sums.get(name, 0.0) + value
                progress.counts[name] = progress.counts.get(name, 0) + round(count)
            self._sums.zero_()
        progress.skipped, progress.skipped_in_a_row = self._skipped.tolist()
        if progress.skipped_in_a_row >= min(MAX_SKIPPED_IN_A_ROW, self.config.max_train_steps):
            first = " from the first step on" if progress.skipped == progress.step else ""
            raise FloatingPointError(
                f"{progress.skipped_in_a_row} losses in a row were not finite{first}; the weights are those before "
                "them. Try a lower --learning_rate, --mixed_precision bf16 or no, and check that the data have no "
                "NaN. The last checkpoint is untouched."
            )

    def take_averages(self) -> dict[str, float]:
        """Means since the last call, of what was finite in steps that took place; every process must call it."""
        self.settle()
        progress = self.progress
        means = {name: value / progress.counts[name] for name, value in progress.sums.items() if progress.counts[name]}
        progress.sums, progress.counts = {}, {}
        return means

    # Checkpoints

    def save(self, streams: Any = None) -> Path | None:
        """Write a checkpoint; every process must call it.

        Returns:
            Its folder, on the main process.
        """
        self.settle()
        tensors = {"model": self.trained(), "ema": self.ema.state_dict(), "optimizer": dict(self._optimizer_state())}
        state = {
            "progress": dataclasses.asdict(self.progress),
            "ema_updates": self.ema.updates,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
            "streams": streams,
            "identity": self.identity,
        }
        path = None
        if self.accelerator.is_main_process:
            keep = self.config.checkpoints_total_limit
            path = save_checkpoint(self.config.output_dir, self.progress.step, tensors, state, keep)
        self.accelerator.wait_for_everyone()
        return path

    def load(self, path: Path) -> dict[str, Any]:
        """Take over a checkpoint.

        Returns:
            Its state.

        Raises:
            CheckpointError: If it does not fit this run; nothing was taken over then.
        """
        state = read_state(path)
        missing = [name for name in ("progress", "ema_updates", "scaler") if name not in state]
        if missing:
            raise CheckpointError(f"{path.name} is damaged: its state.json has no {', '.join(missing)}.")
        trained = self.objective.trained_state()
        model, ema, optimizer = (read_tensors(path, name) for name in ("model", "ema", "optimizer"))
        check_same_tensors(path, "model", model, trained)
        check_same_tensors(path, "ema", ema, self.ema.shadow)
        states = self._optimizer_states(path, optimizer)
        for name, value in model.items():
            put(trained[name], value)
        self.ema.load_state_dict(ema)
        self.ema.updates = state["ema_updates"]
        self._load_optimizers(states)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        self._skipped = torch.tensor([self.progress.skipped, self.progress.skipped_in_a_row])
        self.objective.on_step_end(self.progress.step, self.ema)
        return state

    def trained(self) -> dict[str, Tensor]:
        """Trained weights and buffers, full tensors on the CPU by name; every process must call it."""
        return {name: full(value) for name, value in self.objective.trained_state().items()}

    def result(self) -> dict[str, Tensor]:
        """What is saved: the moving average, the weights where there is none, and frozen weights that lie in shards.

        Every process must call it.
        """
        trained = self.trained()
        state = self.objective.state_dict()
        frozen = {name: full(v) for name, v in state.items() if is_sharded(v) and name not in trained}
        return {**frozen, **trained, **self.ema.state_dict()}

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        for phase, update in self.updates.items():
            for parameter, values in update.inner.state.items():
                for key, value in values.items():
                    if value is None:  # SGD's buffer where there is no momentum
                        continue
                    yield f"{phase}/{self.names[id(parameter)]}/{key}", full(torch.as_tensor(value))

    def _optimizer_states(self, path: Path, saved: Mapping[str, Tensor]) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Phase -> parameter -> key -> tensor, of a checkpoint's file, checked."""
        parameters = dict(self.objective.named_parameters())
        grouped: dict[str, dict[str, dict[str, Tensor]]] = {phase: {} for phase in self.updates}
        for place, value in saved.items():
            phase, name, key = [*place.split("/"), "", ""][:3]
            fits = phase in grouped and name in parameters and place.count("/") == 2
            if not fits or value.shape not in (parameters[name].shape, torch.Size([])):
                raise CheckpointError(
                    f"{path.name} is of another run or damaged: {place!r} of shape {tuple(value.shape)} in "
                    "optimizer.safetensors is no state of a parameter of this run."
                )
            grouped[phase].setdefault(name, {})[key] = value
        return grouped

    def _load_optimizers(self, grouped: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
        parameters = dict(self.objective.named_parameters())
        for phase, states in grouped.items():
            inner = self.updates[phase].inner
            for name, values in states.items():
                parameter = parameters[name]
                inner.state[parameter] = {
                    key: _like(value, parameter, inner.defaults.get("fused")) for key, value in values.items()
                }


def make_optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    """Fused AdamW, or SGD, of the groups that hold a parameter.

    Raises:
        ValueError: If there is nothing to train.
    """
    groups = [{**group, "params": list(group["params"])} for group in groups]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("The objective has no parameter that requires a gradient; there is nothing to train.")
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.learning_rate, momentum=config.sgd_momentum)
    return torch.optim.AdamW(
        groups,
        config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
        fused=True,
    )


def _like(value: Tensor, parameter: Tensor, fused: bool | None) -> Tensor:
    """Optimizer state where its parameter lies, sharded as it; step counts on the device if AdamW is fused."""
    if value.shape != parameter.shape or value.ndim == 0:
        return value.to(parameter.device) if fused else value
    state = torch.empty_like(parameter, dtype=value.dtype).detach()
    put(state, value)
    return state
