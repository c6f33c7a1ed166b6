"""The model card of a probe: how to use it, what it reads, how it was fitted and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_repr.hub import Metric, is_repo_id, model_card
from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.recipe import ProbeRecipe

_NAMES = {"accuracy": "Accuracy", "balanced_accuracy": "Balanced accuracy"}


def probe_card(recipe: ProbeRecipe, head: str, title: str) -> str:
    """README.md of a probe.

    Args:
        recipe: Its recipe.
        head: Class of the head.
        title: Heading; where it is a Hub id, the example loads it.
    """
    recipe, title = _printable(recipe), printable(title)  # much of it may come from others
    base = recipe.base
    metrics = [
        Metric(s.name, s.value, _public(s.dataset), split=s.split, name=_NAMES.get(s.name)) for s in recipe.scores
    ]
    train = str(recipe.train["dataset"])
    on_hub = base.name is not None and not base.local
    return model_card(
        title=title,
        text="\n\n".join(
            [_intro(recipe, head), _usage(title, on_hub), _recipe(recipe), _protocol(recipe.protocol), _scores(recipe)]
        ),
        base_model=base.name if on_hub else None,
        tags=["diffusion", "probe", "image-classification"],
        metrics=metrics,
        datasets=[train] if is_repo_id(train) and "/" in train and not Path(train).exists() else [],
        pipeline_tag="image-classification",
    )


def _printable(value: Any) -> Any:
    """The same with every text fit for one line."""
    if isinstance(value, str):
        return printable(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _printable(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, Mapping):
        return {_printable(key): _printable(part) for key, part in value.items()}
    return type(value)(map(_printable, value)) if isinstance(value, (list, tuple)) else value


def _public(name: str) -> str:
    """The name of a data set without the place where it lay."""
    return name if is_repo_id(name) and not Path(name).exists() else Path(name).stem or "dataset"


def _intro(recipe: ProbeRecipe, head: str) -> str:
    names = recipe.label_names
    listed = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    base = recipe.base.name if not recipe.base.local else Path(recipe.base.name or "").name
    return (
        f"A `{head}` on frozen features of the diffusion model `{base or recipe.base.model_class}` "
        f"(`{recipe.base.model_class}`). It tells {len(names)} classes apart: {listed}."
    )


def _usage(title: str, on_hub: bool) -> str:
    name = title if is_repo_id(title) and "/" in title else "path/to/this/folder"
    base = "" if on_hub else ', base="path/to/the/base/model"'
    return f"""## Use

```python
from diffusers_repr.tasks import Probe

probe = Probe.from_pretrained("{name}"{base})
output = probe(images)  # PIL images, numpy arrays or tensors
print(output.labels, output.probabilities)
```

`diffusers-repr predict {name} image.png` does the same."""


def _recipe(recipe: ProbeRecipe) -> str:
    rows = {
        "layers": ", ".join(f"`{layer}`" for layer in recipe.layers),
        "timestep": ", ".join(f"{level.timestep:g} (nsr {level.nsr:.4g})" for level in recipe.levels),
        "noise": f"{recipe.noise}, seed {recipe.seed}, {recipe.ensemble_size} draw(s) an image",
        "pooling": recipe.pooling,
        "image size": f"{recipe.image_size[0]} x {recipe.image_size[1]} (H x W)",
        "prompt": None if recipe.prompt is None else repr(recipe.prompt),
        "class condition": recipe.class_labels,
        "trained on": f"{recipe.train['rows']} images of {_public(str(recipe.train['dataset']))} "
        f"({recipe.train['split']})",
        "base revision": recipe.base.commit or recipe.base.revision,
        "versions": ", ".join(f"{name} {version}" for name, version in recipe.versions.items()),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["## Recipe", "", "| | |", "|---|---|", *lines])


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


def _scores(recipe: ProbeRecipe) -> str:
    if not recipe.scores:
        return "## Scores\n\nNot measured."
    lines = [
        f"| {_NAMES.get(s.name, s.name)} | {s.value:.4f} | {_public(s.dataset)} | {s.split} | {s.rows} |"
        for s in recipe.scores
    ]
    return "\n".join(
        ["## Scores", "", "| metric | value | data set | split | images |", "|---|---|---|---|---|", *lines]
    )
