"""The model card of a segmenter."""

from __future__ import annotations

from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.card import base_called, classes_called, loaded_from, printable_recipe, task_card
from diffusers_repr.tasks.kept_source import KEPT
from diffusers_repr.tasks.recipe import SegmentationRecipe


def segmentation_card(recipe: SegmentationRecipe, head: str, title: str) -> str:
    """README.md of a segmenter.

    Args:
        recipe: Its recipe.
        head: Class of the head.
        title: Heading; where it is a Hub id, the example loads it.
    """
    recipe, title = printable_recipe(recipe), printable(title)
    intro = (
        f"A `{head}` on frozen features of {base_called(recipe)}: it gives every pixel of an image a class, and how "
        f"uncertain that is. It tells {classes_called(recipe)}."
    )
    own = {"id of no class": recipe.ignore_index}
    tag = "image-segmentation"
    return task_card(recipe, title, intro, _usage(recipe, title), [tag, "few-shot"], tag, own)


def _usage(recipe: SegmentationRecipe, title: str) -> str:
    name, base = loaded_from(recipe, title)
    source = "" if recipe.source in (None, *KEPT) else ", source=source"
    return f"""## Use

```python
from diffusers_repr.tasks import Segmenter

segmenter = Segmenter.from_pretrained("{name}"{base}{source})
output = segmenter(images)  # PIL images, numpy arrays or tensors
output.masks  # class ids of every pixel, at the images' own sizes
output.uncertainty  # of every pixel; output.scores: of every image
output.pictures(images)[0].save("mask.png")
```

`diffusers-repr segment predict {name} image.png --out masks` does the same."""


__all__ = ["segmentation_card"]
