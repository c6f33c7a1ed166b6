"""The model card of a probe: how to use it, what it reads, how it was fitted and what was measured."""

from __future__ import annotations

from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.card import base_called, classes_called, loaded_from, printable_recipe, task_card
from diffusers_repr.tasks.kept_source import KEPT
from diffusers_repr.tasks.recipe import ProbeRecipe


def probe_card(recipe: ProbeRecipe, head: str, title: str) -> str:
    """README.md of a probe.

    Args:
        recipe: Its recipe.
        head: Class of the head.
        title: Heading; where it is a Hub id, the example loads it.
    """
    recipe, title = printable_recipe(recipe), printable(title)  # much of it may come from others
    intro = f"A `{head}` on frozen features of {base_called(recipe)}. It tells {classes_called(recipe)}."
    tag = "image-classification"
    return task_card(recipe, title, intro, _usage(recipe, title), [tag], tag, {"pooling": recipe.pooling})


def _usage(recipe: ProbeRecipe, title: str) -> str:
    name, base = loaded_from(recipe, title)
    source = "" if recipe.source in (None, *KEPT) else ", source=source"
    return f"""## Use

```python
from diffusers_repr.tasks import Probe

probe = Probe.from_pretrained("{name}"{base}{source})
output = probe(images)  # PIL images, numpy arrays or tensors
print(output.labels, output.probabilities)
```

`diffusers-repr predict {name} image.png` does the same."""


__all__ = ["probe_card"]
