"""`check_task`: does a task predict, measure itself, save itself and come back?"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from torch import Tensor

from diffusers_repr.tasks import Task
from diffusers_repr.testing.checks import expect, leaving_alone


def check_task(task: Task, images: Any, data: Any, values: Callable[[Any], Tensor]) -> None:
    """Hold a fitted task to the contract of `Task`.

    Args:
        task: The task, fitted.
        images: What it is called with; a tuple: all its arguments.
        data: What `evaluate` takes.
        values: The numbers of a prediction, to compare predictions by.

    Raises:
        AssertionError: With what was found and what is expected.
    """
    name, given = type(task).__name__, images if isinstance(images, tuple) else (images,)
    expect(isinstance(task, Task), f"{name} is no subclass of Task.")
    modules = [task.denoiser.model, *([] if task.head is None else [task.head])]
    with leaving_alone(f"A prediction of {name}", *modules):
        wanted = values(task(*given))
    expect(bool(wanted.isfinite().all()), f"{name} predicts values that are not finite.")
    expect(torch.equal(values(task(*given)), wanted), f"{name} predicts otherwise when asked again.")
    measured = task.evaluate(data, record=False)
    wrong = {key: value for key, value in measured.items() if not math.isfinite(value)}
    expect(bool(measured) and not wrong, f"evaluate of {name} gives {measured}; expected finite numbers by name.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "task"
        task.save_pretrained(folder, title="A task")
        again = type(task).from_pretrained(folder, base=task.denoiser)
        text = (folder / "README.md").read_text("utf-8")
        task.save_pretrained(folder)  # replaces its own kind
        _refuses_others(task, Path(place) / "other")
    expect(torch.equal(values(again(*given)), wanted), f"{name} predicts otherwise once it was saved and loaded.")
    expect(again.evaluate(data, record=False) == measured, f"{name} measures otherwise once it was saved and loaded.")
    expect(text == task.card("A task"), f"The README.md that {name} saves is not its card.")
    card = ModelCard(text)
    expect("# A task" in card.content, f"The card of {name} has not the title as its heading.")
    expect(card.data.library_name is not None, f"The card of {name} does not tell its library.")


def _refuses_others(task: Task, folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    try:
        task.save_pretrained(folder)
    except FileExistsError:
        return
    expect(False, f"{type(task).__name__} saves itself over a folder that holds something else.")


__all__ = ["check_task"]
