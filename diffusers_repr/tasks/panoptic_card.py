"""The model card of an open-vocabulary segmenter."""

from __future__ import annotations

from pathlib import Path

from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.card import base_called, loaded_from, printable_recipe, task_card
from diffusers_repr.tasks.panoptic_recipe import PanopticRecipe


def panoptic_card(recipe: PanopticRecipe, head: str, title: str) -> str:
    """README.md of an open-vocabulary segmenter.

    Args:
        recipe: Its recipe.
        head: Class of the head.
        title: Heading; where it is a Hub id, the example loads it.
    """
    recipe, title = printable_recipe(recipe), printable(title)
    clip, known = _clip(recipe), f"{recipe.weights[0]:g} for names of the training, {recipe.weights[1]:g} for others"
    words = [f"{name} (stuff)" if at in recipe.stuff else name for at, name in enumerate(recipe.label_names)]
    intro = (
        f"An `{head}` on frozen features of {base_called(recipe)} and the CLIP `{clip}` (ODISE, arXiv 2303.04803): "
        "it gives the segments of an image names in words of yours, also such as were not in its training. It was "
        f"trained on {len(words)} classes: {', '.join(words)}."
    )
    own = {"CLIP": f"`{clip}`, its share {known}", "prompts": f"`{recipe.template}`"}
    tag = "image-segmentation"
    return task_card(recipe, title, intro, _usage(recipe, title), [tag, "open-vocabulary", "odise"], tag, own)


def _clip(recipe: PanopticRecipe) -> str:
    clip = recipe.clip
    name = Path(clip.name or "").name if clip.local else clip.name
    return name or str(clip.model_class)


def _usage(recipe: PanopticRecipe, title: str) -> str:
    name, base = loaded_from(recipe, title)
    clip = "" if recipe.clip.name is not None and not recipe.clip.local else ', clip="path/to/the/clip"'
    return f"""## Use

```python
from diffusers_repr.tasks import OpenVocabularySegmenter

segmenter = OpenVocabularySegmenter.from_pretrained("{name}"{base}{clip})
output = segmenter(images, ["dog, puppy", "cat"])  # PIL images, numpy arrays or tensors; names with synonyms
output.segments()  # (name, score, pixels) of each segment of the first image
output.pictures(images)[0].save("segments.png")
```

`diffusers-repr segment open {name} image.png --vocabulary "dog, puppy" cat --out segments` does the same."""


__all__ = ["panoptic_card"]
