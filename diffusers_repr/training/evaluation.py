"""Validation of a run while it goes on: a grid of samples, and whatever numbers the user measures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from diffusers_repr.hub import atomic_write
from diffusers_repr.pictures.grid import image_grid
from diffusers_repr.training.config import TrainingConfig
from diffusers_repr.training.logs import read_log
from diffusers_repr.training.run import Run

Evaluate = Callable[[Any, int], Mapping[str, float]]


class Evaluations:
    """Numbers measured on the pipeline of the averaged weights, in `evaluation.jsonl`.

    Args:
        config: The run's.
        step: Where the run starts; lines beyond it are dropped.
        accelerator: The run's; only its main process measures.
        evaluate: `(pipeline, step) -> {name: number}`, or None.

    Attributes:
        lines: What the file holds.
    """

    def __init__(self, config: TrainingConfig, step: int, accelerator: Accelerator, evaluate: Evaluate | None) -> None:
        self.config, self.accelerator, self.evaluate = config, accelerator, evaluate
        self.path = Path(config.output_dir) / "evaluation.jsonl"
        self.lines = read_log(self.path, step) if evaluate else []

    @property
    def last(self) -> dict[str, float]:
        """The newest numbers; empty without any."""
        return {k: v for k, v in self.lines[-1].items() if k != "step"} if self.lines else {}

    def measure(self, pipe: Any, step: int) -> None:
        """Measure, and write a line; a step that was measured before is measured anew."""
        if self.evaluate is None:
            return
        numbers = {name: float(value) for name, value in self.evaluate(pipe, step).items()}
        self.lines = [line for line in self.lines if line["step"] < step] + [{"step": step, **numbers}]
        atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        if self.config.report_to != "none":
            self.accelerator.log(numbers, step=step)


def validate(run: Run, evaluations: Evaluations, picture: str, names: Sequence[str] | None) -> None:
    """Write a PNG grid of samples of the averaged weights, in rows of 8, and measure; every process must call it.

    Args:
        run: The run.
        evaluations: What is measured.
        picture: Path of the grid in the output folder.
        names: Of the classes, if the data have some.
    """
    config = run.config
    if not config.eval_batch_size and evaluations.evaluate is None:
        return
    state = run.result()
    if run.accelerator.is_main_process:
        pipe = run.objective.result(state)
        pipe.to(run.accelerator.device)
        if hasattr(pipe, "set_progress_bar_config"):
            pipe.set_progress_bar_config(disable=True)
        with torch.random.fork_rng():
            if config.eval_batch_size:
                write_samples(run, pipe, Path(config.output_dir) / picture, names)
            evaluations.measure(pipe, run.progress.step)
    run.accelerator.wait_for_everyone()


def write_samples(run: Run, pipe: Any, path: Path, names: Sequence[str] | None) -> None:
    """The grid of samples, with the run's name and step above, and of classes their names beside."""
    config, objective = run.config, run.objective
    generator = torch.Generator("cpu").manual_seed(config.seed)
    images = objective.preview(pipe, config.eval_batch_size, generator, config.num_inference_steps)
    labels = objective.preview_labels(len(images))
    rows = None if labels is None else [_name(labels[at], names) for at in range(0, len(images), 8)]
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{Path(config.output_dir).name}, step {run.progress.step:,}"
    image_grid(images, title=title, row_titles=rows).save(path)


def _name(label: int, names: Sequence[str] | None) -> str:
    return names[label] if names and label < len(names) else f"class {label}"
