"""What is checked before a run costs anything, and when it ends."""

from __future__ import annotations

import warnings
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import get_token

from diffusers_repr.hub import HubError
from diffusers_repr.objectives import Objective, PipelineArtifact
from diffusers_repr.objectives.artifacts import check_places
from diffusers_repr.training.config import TrainingConfig
from diffusers_repr.training.run import Progress


def check_services(config: TrainingConfig) -> None:
    """Places and services that the run will need.

    Raises:
        HubError: If the result is to be pushed and there is no token.
        NotADirectoryError: If the output folder is a file.
    """
    if config.push_to_hub and get_token() is None:
        raise HubError("`push_to_hub` needs a token: log in with `hf auth login`, or set HF_TOKEN.")
    if Path(config.output_dir).is_file():
        raise NotADirectoryError(f"--output_dir {config.output_dir} is a file; name a folder.")


def check_train_data(data: Any) -> None:
    """Raise TypeError for what is no training data, such as a data set that was not opened for it."""
    if not all(hasattr(data, name) for name in ("on_device", "fingerprint")):
        raise TypeError(
            "`train` takes data of load_train_data(DataConfig(dataset_name=...), channels), or with dataset= one that "
            f"is loaded; got a {type(data).__name__}."
        )


def check_result(objective: Objective, config: TrainingConfig) -> None:
    """What will be saved, and sampled from, must be there at the end.

    Raises:
        TypeError: For what is no objective, or if an artifact cannot be made.
        ValueError: If the objective saves nothing, two of its artifacts lie in one folder, or samples are asked of one
            that makes none.

    Warns:
        UserWarning: Of what is trained and not saved.
    """
    if not isinstance(objective, Objective):
        raise TypeError(
            f"`train` takes an Objective, such as DiffusionObjective(denoiser); got a {type(objective).__name__}."
        )
    artifacts = objective.artifacts()
    method = type(objective).__name__
    check_places(artifacts, method)
    for artifact in artifacts:
        artifact.check()
    own_samples = type(objective).preview is not Objective.preview
    if config.eval_batch_size and not own_samples and not isinstance(artifacts[0], PipelineArtifact):
        raise ValueError(f"{method} yields no pipeline to sample from; set eval_batch_size to 0 (samples.png).")
    unsaved = objective.unsaved()
    if unsaved:
        parts = ", ".join(f"{name} ({count:,} parameters)" for name, count in unsaved.items())
        first = _model_around(objective, next(iter(unsaved)))
        warnings.warn(
            f"{method} trains {parts}, which none of its artifacts holds: checkpoints alone keep it. To save a model, "
            f"add ModelArtifact(self.{first}, {first!r}, folder={f'heads/{first}'!r}) to what `artifacts` returns; to "
            f"leave it behind on purpose, set discarded = ({first!r},).",
            stacklevel=3,
        )


def _model_around(objective: Objective, name: str) -> str:
    """Path of the outermost model that a submodule (or parameter) lies in and that can be saved; its own without."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return next((path for path in paths if hasattr(attrgetter(path)(objective), "save_pretrained")), name)


def check_accumulation(accelerator: Accelerator) -> None:
    """The loop accumulates by itself; accelerate must not divide the loss once more.

    Raises:
        ValueError: If accelerate was told to.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}; leave it at 1 "
            "there, and set it in TrainingConfig or by the script's --gradient_accumulation_steps."
        )


def check_place(accelerator: Accelerator, step: int, output_dir: str) -> None:
    """All processes must go on from the same step; waits for them.

    Raises:
        RuntimeError: If they do not, as on several machines that do not share the folder.
    """
    if accelerator.num_processes == 1:
        return
    steps = accelerator.gather(torch.tensor([step], device=accelerator.device)).tolist()
    if len(set(steps)) > 1:
        raise RuntimeError(
            f"The processes found different checkpoints in {output_dir}: they would go on from the steps {steps}. All "
            "machines must see the same --output_dir."
        )


def warn_of_skipped(progress: Progress) -> None:
    """Say so where a run ends amid steps that were not finite, or had more of them than others."""
    if progress.skipped_in_a_row or 2 * progress.skipped > progress.step:
        last = progress.skipped_in_a_row
        warnings.warn(
            (f"The last {last} steps were skipped" if last else "Most steps were skipped")
            + f", {progress.skipped} of {progress.step} in all: their loss or its gradient was not finite. What is "
            "saved is what the others made. Try a lower --learning_rate.",
            stacklevel=3,
        )
