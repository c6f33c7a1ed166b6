"""The tasks that are saved: of each its recipe, its heads, its card, and whether head and recipe are of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_repr.heads import Head, MapClassifier, OdiseHead, PixelEnsembleHead, PooledHead
from diffusers_repr.tasks.correspondence_card import matcher_card
from diffusers_repr.tasks.panoptic_card import panoptic_card
from diffusers_repr.tasks.panoptic_recipe import PanopticRecipe
from diffusers_repr.tasks.probe_card import probe_card
from diffusers_repr.tasks.recipe import FeatureRecipe, MatcherRecipe, ProbeRecipe, SegmentationRecipe, TaskRecipe
from diffusers_repr.tasks.segmentation_card import segmentation_card
from diffusers_repr.tasks.zero_shot_card import zero_shot_card
from diffusers_repr.tasks.zero_shot_recipe import ZeroShotRecipe


@dataclass(frozen=True)
class TaskFormat:
    """A kind of task as files in a folder.

    Attributes:
        recipe: Class of its recipe, which names the file.
        head: Class of which its heads are, or several; None: it has none.
        card: `(recipe, class of the head, title) -> README.md`.
        differs: `(head's config, recipe) -> what does not fit`, None where head and recipe are of one task.
    """

    recipe: type[FeatureRecipe] | type[ZeroShotRecipe]
    head: type[Head] | tuple[type[Head], ...] | None
    card: Callable[[Any, str, str], str]
    differs: Callable[[Any, Any], str | None]

    @property
    def noun(self) -> str:
        """What it is called in messages, and on the Hub's list of kinds."""
        return self.recipe.NOUN

    @property
    def file(self) -> str:
        """The recipe's file."""
        return self.recipe.FILE


def _probe_differs(config: Any, recipe: ProbeRecipe) -> str | None:
    if "in_features" not in config:
        return _maps_differ(config, recipe)
    values, classes = sum(recipe.base.features.values()) * len(recipe.levels), len(recipe.label_names)
    shape = (config["in_features"], config["num_classes"])
    if shape == (values, classes):
        return None
    return (
        f"takes {shape[0]} values and tells {shape[1]} classes apart; {recipe.FILE} describes {values} values and "
        f"{classes} classes"
    )


def _maps_differ(config: Any, recipe: TaskRecipe) -> str | None:
    has = (list(config["layers"]), list(config["channels"]), config["levels"], config["num_classes"])
    told = [recipe.base.features[layer] for layer in recipe.layers]
    wanted = (list(recipe.layers), told, len(recipe.levels), len(recipe.label_names))
    if has == wanted:
        return None
    return (
        f"reads {has[2]} levels of {dict(zip(has[0], has[1], strict=False))} and tells {has[3]} classes apart; "
        f"{recipe.FILE} describes {wanted[2]} levels of {dict(zip(wanted[0], told, strict=True))} and {wanted[3]} "
        "classes"
    )


def _panoptic_differs(config: Any, recipe: PanopticRecipe) -> str | None:
    reads = {f"{part}.{path}": channels for part, path, channels, _ in config["taps"]}
    if reads == dict(recipe.base.features):
        return None
    return f"reads {reads}; {recipe.FILE} describes {dict(recipe.base.features)}"


def _no_head(config: Any, recipe: Any) -> None:
    return None


PROBE = TaskFormat(ProbeRecipe, (PooledHead, MapClassifier), probe_card, _probe_differs)
SEGMENTER = TaskFormat(SegmentationRecipe, PixelEnsembleHead, segmentation_card, _maps_differ)
PANOPTIC = TaskFormat(PanopticRecipe, OdiseHead, panoptic_card, _panoptic_differs)
MATCHER = TaskFormat(MatcherRecipe, None, matcher_card, _no_head)
ZERO_SHOT = TaskFormat(ZeroShotRecipe, None, zero_shot_card, _no_head)
FORMATS: dict[str, TaskFormat] = {one.noun: one for one in (PROBE, SEGMENTER, PANOPTIC, MATCHER, ZERO_SHOT)}


def format_in(folder: Path) -> TaskFormat | None:
    """The format whose recipe lies in a folder; None if there is none."""
    return next((one for one in FORMATS.values() if (folder / one.file).is_file()), None)


__all__ = ["FORMATS", "MATCHER", "PANOPTIC", "PROBE", "SEGMENTER", "ZERO_SHOT", "TaskFormat", "format_in"]
