"""What the model cards of all tasks have: the recipe, how the head was fitted, what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_repr.hub import Metric, is_repo_id, model_card
from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.kept_source import KEPT
from diffusers_repr.tasks.recipe import FeatureRecipe, TaskRecipe

METRIC_NAMES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "mean_iou": "Mean IoU",
    "mean_iou_legacy": "Mean IoU, as the paper's code counts it",
    "pixel_accuracy": "Pixel accuracy",
    "pq": "Panoptic quality",
    "pq_known": "Panoptic quality of names of the training",
    "pq_new": "Panoptic quality of other names",
}


def task_card(
    recipe: FeatureRecipe, title: str, intro: str, usage: str, tags: Sequence[str], pipeline_tag: str, own: Mapping
) -> str:
    """README.md of a task.

    Args:
        recipe: Its recipe, as `printable_recipe` gives it.
        title: Heading.
        intro: What it is, in a sentence or two.
        usage: How it is used.
        tags: Words the Hub filters by.
        pipeline_tag: Task id of the Hub.
        own: Further lines of the table of the recipe, by name.
    """
    base = recipe.base
    train = str(recipe.train["dataset"]) if isinstance(recipe, TaskRecipe) else ""
    metrics = [
        Metric(s.name, s.value, public(s.dataset), split=s.split, name=METRIC_NAMES.get(s.name), task=pipeline_tag)
        for s in recipe.scores
    ]
    fitting = [_protocol(recipe.protocol)] if isinstance(recipe, TaskRecipe) else []
    sections = [intro, usage, _recipe(recipe, own), *fitting, scores_section(recipe)]
    return model_card(
        title=title,
        text="\n\n".join(sections),
        base_model=base.name if on_hub(recipe) else None,
        tags=["diffusion", recipe.NOUN.replace(" ", "-"), *tags],
        metrics=metrics,
        datasets=[train] if is_repo_id(train) and "/" in train and not Path(train).exists() else [],
        pipeline_tag=pipeline_tag,
    )


def printable_recipe(value: Any) -> Any:
    """The same with every text fit for one line; much of a recipe may come from others."""
    if isinstance(value, str):
        return printable(value)
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: printable_recipe(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **changes)
    if isinstance(value, Mapping):
        return {printable_recipe(key): printable_recipe(part) for key, part in value.items()}
    return type(value)(map(printable_recipe, value)) if isinstance(value, (list, tuple)) else value


def public(name: str) -> str:
    """The name of a data set without the place where it lay."""
    return name if is_repo_id(name) and not Path(name).exists() else Path(name).stem or "dataset"


def on_hub(recipe: FeatureRecipe) -> bool:
    """Whether the base is one that others find by its name."""
    return recipe.base.name is not None and not recipe.base.local


def base_called(recipe: FeatureRecipe) -> str:
    """The base in a sentence: its name and its class."""
    base = recipe.base
    name = base.name if not base.local else Path(base.name or "").name
    return f"the diffusion model `{name or base.model_class}` (`{base.model_class}`)"


def classes_called(recipe: TaskRecipe) -> str:
    """How many classes there are and which, the first twenty by name."""
    names = recipe.label_names
    more = f", ... ({len(names)} in all)" if len(names) > 20 else ""
    return f"{len(names)} classes apart: {', '.join(names[:20])}{more}"


def loaded_from(recipe: FeatureRecipe, title: str) -> tuple[str, str]:
    """What an example loads a task from, and the argument for a base that is not on the Hub."""
    name = title if is_repo_id(title) and "/" in title else "path/to/this/folder"
    return name, "" if on_hub(recipe) else ', base="path/to/the/base/model"'


def _features(source: str | None) -> str | None:
    if source is None:
        return None
    return f"of a `{source}`, {'which is in `source/`' if source in KEPT else 'which is passed as source=...'}"


def _recipe(recipe: FeatureRecipe, own: Mapping[str, Any]) -> str:
    sides = " x ".join(map(str, recipe.image_size))
    rows = {
        "layers": ", ".join(f"`{layer}`" for layer in recipe.layers),
        "timestep": ", ".join(f"{level.timestep:g} (nsr {level.nsr:.4g})" for level in recipe.levels),
        "noise": f"{recipe.noise}, seed {recipe.seed}, {recipe.ensemble_size} draw(s) an image",
        **own,
        "features": _features(recipe.source),
        "image size": "the images' own" if recipe.image_size == "keep" else f"{sides} (H x W)",
        "prompt": None if recipe.prompt is None else repr(recipe.prompt),
        "class condition": recipe.class_labels,
        "trained on": _trained_on(recipe),
        "base revision": recipe.base.commit or recipe.base.revision,
        "versions": ", ".join(f"{name} {version}" for name, version in recipe.versions.items()),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["## Recipe", "", "| | |", "|---|---|", *lines])


def _trained_on(recipe: FeatureRecipe) -> str | None:
    if not isinstance(recipe, TaskRecipe):
        return None
    return f"{recipe.train['rows']} images of {public(str(recipe.train['dataset']))} ({recipe.train['split']})"


def _protocol(protocol: Mapping[str, Any]) -> str:
    changed = list(protocol.get("changed", []))
    changes = f" with other values of {', '.join(changed)}" if changed else ""
    settings = {k: v for k, v in protocol.items() if k not in ("name", "version", "source", "changed", "chosen")}
    lines = [f"| {name} | {_short(value)} |" for name, value in settings.items()]
    chosen = [
        f"| chosen {name} | {('no', 'yes')[value] if isinstance(value, bool) else f'{value:.6g}'} |"
        for name, value in protocol.get("chosen", {}).items()
    ]
    head = f"Protocol `{protocol['name']}`, version {protocol['version']}{changes}. {protocol.get('source', '')}"
    return "\n".join(["## Fitting", "", head, "", "| | |", "|---|---|", *lines, *chosen])


def _short(value: Any) -> str:
    """Numbers with as many digits as people read."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def scores_section(recipe: Any) -> str:
    """What was measured, as a table."""
    if not recipe.scores:
        return "## Scores\n\nNot measured."
    lines = [
        f"| {METRIC_NAMES.get(s.name, s.name)} | {s.value:.4f} | {public(s.dataset)} | {s.split} | {s.rows} |"
        for s in recipe.scores
    ]
    return "\n".join(
        ["## Scores", "", "| metric | value | data set | split | images |", "|---|---|---|---|---|", *lines]
    )


__all__ = [
    "METRIC_NAMES",
    "base_called",
    "classes_called",
    "loaded_from",
    "on_hub",
    "printable_recipe",
    "public",
    "scores_section",
    "task_card",
]
