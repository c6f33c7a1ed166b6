"""The model card of a saved setting of correspondence."""

from __future__ import annotations

from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.card import base_called, loaded_from, printable_recipe, task_card
from diffusers_repr.tasks.kept_source import KEPT
from diffusers_repr.tasks.recipe import MatcherRecipe


def matcher_card(recipe: MatcherRecipe, head: str, title: str) -> str:
    """README.md of a matcher.

    Args:
        recipe: Its recipe.
        head: Class of the head; there is none.
        title: Heading; where it is a Hub id, the example loads it.
    """
    recipe, title = printable_recipe(recipe), printable(title)
    intro = (
        f"Which point of one photograph is which of another, by the nearest feature of {base_called(recipe)} "
        "([DIFT](https://arxiv.org/abs/2306.03881)). Nothing was trained: this folder holds a setting, not weights."
    )
    found = recipe.chosen_on
    own = {"chosen on": None if found is None else f"{found['pairs']} pairs of {found['dataset']}"}
    return task_card(recipe, title, intro, _usage(recipe, title), ["correspondence"], "image-feature-extraction", own)


def _usage(recipe: MatcherRecipe, title: str) -> str:
    name, base = loaded_from(recipe, title)
    source = "" if recipe.source in (None, *KEPT) else ", source=source"
    return f"""## Use

```python
from diffusers_repr.tasks import Correspondence

task = Correspondence.from_pretrained("{name}"{base}{source})
found = task(left, right, [(120, 80)])  # points (x, y) in pixels of the left image
print(found.matches, found.scores)
found.plot().save("matches.png")
```"""


__all__ = ["matcher_card"]
