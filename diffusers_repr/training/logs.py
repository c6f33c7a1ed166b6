"""The log of a run: `loss.jsonl`, which survives kills, and accelerate's trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from diffusers_repr.hub import atomic_write
from diffusers_repr.hub.schema import integer, mapping, number, optional, record, text
from diffusers_repr.training.config import TrainingConfig
from diffusers_repr.training.seeds import learning_rate

if TYPE_CHECKING:
    from diffusers_repr.training.run import Run


class Log:
    """One line each `logging_steps`: step, means of what the objective logs, learning rate, speed, skipped steps.

    Args:
        config: The run's.
        step: Where the run starts; lines a killed run wrote beyond it are dropped.
        accelerator: The run's; only its main process writes.
        recipe: Settings that trackers show.

    Attributes:
        lines: What `loss.jsonl` holds.
    """

    def __init__(
        self, config: TrainingConfig, step: int, accelerator: Accelerator, recipe: Mapping[str, Any] | None
    ) -> None:
        self.config, self.accelerator = config, accelerator
        self.path = Path(config.output_dir) / "loss.jsonl"
        self.lines = read_log(self.path, step)
        self.losses: list[str] = []  # names of those of the phases
        accelerator.wait_for_everyone()  # all have read what the first now writes
        if accelerator.is_main_process:
            atomic_write(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.tracked = config.report_to != "none"
        if self.tracked:
            shown = {k: v for k, v in (recipe or {}).items() if isinstance(v, (int, float, str, bool))}
            accelerator.init_trackers("logs", config=shown)

    def write(self, run: Run, means: Mapping[str, float], images_per_second: float) -> None:
        """Add a line for the steps since the last one."""
        progress, phases = run.progress, run.objective.phases
        self.losses = ["loss"] if len(phases) == 1 else [f"{phase}_loss" for phase in phases]
        line = {
            "step": progress.step,
            **{name: means.get(name) for name in self.losses},
            **{name: value for name, value in means.items() if name not in self.losses},
            "learning_rate": learning_rate(self.config, progress.step - 1),
            "skipped": progress.skipped,
            "images_per_second": round(images_per_second, 1),
        }
        self.lines.append(line)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.tracked:
            values = {name: value for name, value in line.items() if name != "step" and value is not None}
            self.accelerator.log(values, step=progress.step)

    def summary(self) -> str:
        """The last line, for the progress bar."""
        line = self.lines[-1]
        losses = [(name, line[name]) for name in self.losses]
        shown = ", ".join(f"{name}={'none' if value is None else f'{value:.4f}'}" for name, value in losses)
        return f"{shown}, images/s={line['images_per_second']:.0f}, skipped={line['skipped']}"

    def close(self) -> None:
        """End the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []


_MAX_LOG = 1 << 30
_STEP = record({"step": integer(0, 10**12)}, others=True)
_LINE = mapping(optional(number(finite=False)), keys=text(1000))


def read_log(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Lines up to a step: a killed run may have written more, and half a line.

    Raises:
        ValueError: For a line that is no object of a step and numbers; names file and line.
    """
    if not path.is_file():
        return []
    if path.stat().st_size > _MAX_LOG:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes; a log has at most {_MAX_LOG}.")
    found = []
    with path.open("rb") as file:
        for number_of, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                break
            at = f"{path}, line {number_of}"
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{at} is no JSON ({error}); correct it, or move the file away.") from error
            if _STEP(line, at)["step"] <= last_step:
                found.append(_LINE(line, at) and line)
    return found
