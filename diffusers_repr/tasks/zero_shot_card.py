"""The model card of a zero-shot classifier: how to use it, what it asks the model, what was measured."""

from __future__ import annotations

from typing import Any

from diffusers_repr.hub import Metric, model_card
from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.card import (
    METRIC_NAMES,
    base_called,
    classes_called,
    loaded_from,
    on_hub,
    printable_recipe,
    public,
    scores_section,
)
from diffusers_repr.tasks.zero_shot_recipe import ZeroShotRecipe

_TAG = "zero-shot-image-classification"


def zero_shot_card(recipe: ZeroShotRecipe, head: str, title: str) -> str:
    """README.md of a zero-shot classifier.

    Args:
        recipe: Its recipe.
        head: Nothing: it has none.
        title: Heading; where it is a Hub id, the example loads it.
    """
    recipe, title = printable_recipe(recipe), printable(title)
    told: Any = recipe
    intro = (
        "A zero-shot classifier by denoising errors (Diffusion Classifier, arXiv 2303.16203) of "
        f"{base_called(told)}. It tells {classes_called(told)}. Nothing was trained: it is a recipe, "
        "and the base is all the weights."
    )
    metrics = [
        Metric(s.name, s.value, public(s.dataset), split=s.split, name=METRIC_NAMES.get(s.name), task=_TAG)
        for s in recipe.scores
    ]
    return model_card(
        title=title,
        text="\n\n".join([intro, _usage(recipe, title), _table(recipe), _classes(recipe), scores_section(told)]),
        base_model=recipe.base.name if on_hub(told) else None,
        tags=["diffusion", recipe.NOUN, _TAG],
        metrics=metrics,
        datasets=[],
        pipeline_tag=_TAG,
    )


def _usage(recipe: ZeroShotRecipe, title: str) -> str:
    told: Any = recipe
    name, base = loaded_from(told, title)
    return f"""## Use

```python
from diffusers_repr.tasks import ZeroShotClassifier

classifier = ZeroShotClassifier.from_pretrained("{name}"{base})
output = classifier(images)  # PIL images, numpy arrays or tensors
print(output.labels, output.confidence, output.evaluations)
```

`diffusers-repr classify {name} image.png` does the same."""


def _table(recipe: ZeroShotRecipe) -> str:
    rule = ", ".join(f"{name} {_short(value)}" for name, value in vars(recipe.rule).items() if value is not None)
    learned = recipe.calibration
    rows = {
        "rule": f"{recipe.rule_name}: {rule}",
        "loss": recipe.loss,
        "several prompts of a class": recipe.ensemble if recipe.classes.prompts is not None else None,
        "noise": f"of each image its own, the same for all classes; seed {recipe.seed}",
        "image size": f"{recipe.image_size[0]} x {recipe.image_size[1]} (H x W), {recipe.resize}",
        "levels learned from": None
        if learned is None or recipe.train is None
        else f"{learned.rows} images of {public(str(recipe.train['dataset']))} ({recipe.train['split']})",
        "most telling levels": None if learned is None else _short(learned.timesteps[:8]),
        "base revision": recipe.base.commit or recipe.base.revision,
        "versions": ", ".join(f"{name} {version}" for name, version in recipe.versions.items()),
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
    return "\n".join(["## Recipe", "", "| | |", "|---|---|", *lines])


def _classes(recipe: ZeroShotRecipe) -> str:
    classes = recipe.classes
    told = classes.prompts if classes.prompts is not None else [(str(one),) for one in classes.class_labels or ()]
    lines = [f"| {name} | {'; '.join(words)} |" for name, words in zip(classes.names[:50], told, strict=False)]
    more = [] if len(classes) <= 50 else [f"| ... | {len(classes)} in all |"]
    return "\n".join(["## Classes", "", "| class | the model is told |", "|---|---|", *lines, *more])


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_short, value[:8])) + (" ..." if len(value) > 8 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


__all__ = ["zero_shot_card"]
