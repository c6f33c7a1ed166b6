"""What a run leaves: the pipeline with the averaged weights, heads apart, samples, the recipe and a card."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffusers_repr.config.recipe import to_yaml
from diffusers_repr.hub import Metric, atomic_write, is_repo_id, model_card, push_folder, write_json
from diffusers_repr.hub.allowed import ARTIFACTS
from diffusers_repr.hub.places import public_name, without_places
from diffusers_repr.objectives import Objective, PipelineArtifact
from diffusers_repr.objectives.adapters import ADAPTERS, loading
from diffusers_repr.training.config import recipe_of
from diffusers_repr.training.lora import not_apart
from diffusers_repr.training.run import Run


def save_result(run: Run, recipe: Mapping[str, Any]) -> None:
    """Write pipeline, heads and recipe into the output folder; every process must call it."""
    config, state = run.config, run.result()
    if run.accelerator.is_main_process:
        folder = Path(config.output_dir)
        run.objective.save_pretrained(folder, state, getattr(torch, config.save_dtype))
        record_artifacts(run.objective, folder)
        atomic_write(folder / "recipe.yaml", to_yaml(kept_settings(run, recipe)))
    run.accelerator.wait_for_everyone()


def record_artifacts(objective: Objective, folder: Path) -> None:
    """Write down the files of artifacts in folders of their own, which belong to what is uploaded.

    Args:
        objective: Of the run.
        folder: Of the result.
    """
    places = [folder / artifact.folder for artifact in objective.artifacts() if artifact.folder]
    files = sorted({path.relative_to(folder).as_posix() for place in places for path in place.rglob("*")
                    if path.is_file()})  # fmt: skip
    if files:
        write_json(folder / ARTIFACTS, files)
    else:
        (folder / ARTIFACTS).unlink(missing_ok=True)  # an earlier run's list would let its files be uploaded


def write_card(
    run: Run, data: Any, lines: list[dict[str, Any]], recipe: Mapping[str, Any], measured: Mapping[str, float]
) -> None:
    """Write the card, and push the folder if asked to; every process must call it."""
    config = run.config
    if run.accelerator.is_main_process:
        folder, kept = Path(config.output_dir), without_places(kept_settings(run, recipe))
        atomic_write(folder / "README.md", card(run, data, lines, kept, measured))
        if config.push_to_hub:
            push_result(folder, config.hub_model_id or "", private=config.hub_private)
    run.accelerator.wait_for_everyone()


def kept_settings(run: Run, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that make the run again."""
    config = run.config
    return {k: v for k, v in recipe.items() if k in recipe_of(config) or k not in vars(config)}


def push_result(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Trained with diffusers-repr",
    **kwargs: Any,
) -> str:
    """Push the folder of a run without its checkpoints, logs of trackers, previews and places on this machine.

    Args:
        folder: Of the run.
        repo_id: `"user/name"`.
        private: Whether a repository made here is private.
        token: Hub token with the right to write.
        commit_message: First line of the commit.
        **kwargs: Further arguments of `push_folder`.

    Returns:
        Address of the commit, as `push_folder`, which also tells the errors.
    """
    return push_folder(
        folder,
        repo_id,
        kind="training result",
        private=private,
        token=token,
        commit_message=commit_message,
        **kwargs,
    )


def card(
    run: Run, data: Any, lines: list[dict[str, Any]], recipe: Mapping[str, Any], measured: Mapping[str, float]
) -> str:
    """README.md of the result: what it is, data, steps, losses, command and recipe."""
    config, objective = run.config, run.objective
    last = lines[-1] if lines else {"step": run.progress.step, "skipped": run.progress.skipped}
    skip = ("step", "learning_rate", "skipped", "images_per_second")
    tail = lines[-max(1, len(lines) // 20) :]
    means = {
        name: sum(values) / len(values)
        for name in (key for key in last if key not in skip)
        if (values := [line[name] for line in tail if line.get(name) is not None])
    }
    losses = "\n".join(f"| {name} | {value:.4f} |" for name, value in means.items())
    numbers = "\n".join(f"| {name} | {value:.4g} |" for name, value in {**objective.metrics(), **measured}.items())
    size = sum(p.numel() for module in objective.ema_modules().values() for p in module.parameters())
    script = Path(sys.argv[0]).name
    command = f"accelerate launch examples/{script} --config recipe.yaml" if script.startswith("train_") else ""
    names = getattr(data, "class_names", None)
    size_of_data = f"{len(data):,} images" if hasattr(data, "__len__") else "a stream"
    method = type(objective).__name__
    about = dict(objective.card)
    folder, named = Path(config.output_dir), about.pop("metrics", {})
    own = about.pop("text", "").replace("{folder}", config.hub_model_id or folder.name)
    weights = "the moving average" if config.ema_max_decay else "those of the last step"
    apart = "; projectors and heads lie apart in `heads/`" if (folder / "heads").is_dir() else ""
    parts = [own.strip(), adapters_text(objective, folder, config.hub_model_id or folder.name)]
    parts += ["![samples](samples.png)"] if config.eval_batch_size else []
    own = "".join(f"{part}\n\n" for part in parts if part)
    kind, name = about.pop("kind"), data_name(data, recipe)
    of, split = ("", "") if name is None else (f" of `{name}`", f", split `{recipe.get('dataset_split', 'train')}`")
    what = f"{'An' if kind[0] in 'aeiou' else 'A'} {kind} of {size:,} parameters"
    text = f"""{what}, trained with `{method}` of diffusers-repr. The weights are
{weights}, saved in {config.save_dtype}{apart}.

{own}- Data: {size_of_data}{of}{split}, and no other.
- Classes: {len(names) if names else "none"}.
- Steps: {last["step"]:,} with seed {config.seed}; {last["skipped"]} skipped, where the loss was not finite.

| mean of the last twentieth of `loss.jsonl` | |
|---|---|
{losses or "| loss | none |"}
{numbers}

## Recipe

{f"`{command}`, with `recipe.yaml`:" if command else "`recipe.yaml`:"}

```yaml
{to_yaml(dict(recipe))}```
"""
    return model_card(
        title=folder.name,
        text=text,
        metrics=[Metric(value=measured[key], **parts) for key, parts in named.items() if key in measured],
        datasets=[name] if name and "/" in name and is_repo_id(name) and not Path(name).exists() else [],
        **about,
    )


def adapters_text(objective: Objective, folder: Path, name: str) -> str:
    """How to load the adapters that lie in the folder of a result, or why there are none; empty if none were trained.

    Args:
        objective: Of the run.
        folder: Of the result.
        name: What readers know it by.
    """
    first = objective.artifacts()[0]
    if not any(".lora_" in key for key in objective.trained_state()) or not isinstance(first, PipelineArtifact):
        return ""
    if not (folder / ADAPTERS).is_file():
        return not_apart(objective) or ""
    found = (loading(first.pipeline, part, name) for part in first.components)
    line = next((line for line in found if line), None)
    return (
        f"Low-rank adapters were trained. They are merged into these weights; `{ADAPTERS}` holds them alone, for "
        f"the model that they were trained on: `{line}`. Loaded onto these weights they would act twice."
    )


def data_name(data: Any, recipe: Mapping[str, Any]) -> str | None:
    """The data set's name, in the words of the recipe or its own, without places on this machine; None without one."""
    name = recipe.get("dataset_name") or getattr(data, "name", None)
    return None if name is None else public_name(str(name))
