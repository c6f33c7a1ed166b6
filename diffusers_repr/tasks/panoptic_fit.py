"""Training of an open-vocabulary segmenter: the loop, with a recipe beside what it saves, and measures in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.data.panoptic_data import PanopticTrainData, to_maps
from diffusers_repr.data.transforms import to_unit
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads.odise.vocabulary import Vocabulary
from diffusers_repr.hub import write_json
from diffusers_repr.hub.places import public_name
from diffusers_repr.objectives.artifacts import FixedArtifact
from diffusers_repr.objectives.odise import OdiseConfig, OdiseObjective
from diffusers_repr.tasks.files import written_recipe
from diffusers_repr.tasks.panoptic_recipe import PanopticRecipe
from diffusers_repr.tasks.recipe import Score

if TYPE_CHECKING:
    from diffusers_repr.training import TrainingConfig

MEASURES = ("pq", "pq_known", "pq_new", "mean_iou")


class RecipeFile:
    """`panoptic.json` beside the weights that a run saves: with it the run's folder is a task.

    Args:
        recipe: Of the task.
        folder: Of the run.
    """

    def __init__(self, recipe: PanopticRecipe, folder: str | Path) -> None:
        self.recipe, self.folder = recipe, Path(folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it."""
        write_json(Path(folder) / self.recipe.FILE, written_recipe(self.recipe, Path(folder)).to_dict())

    def record(self, scores: list[Score]) -> None:
        """Keep scores, also in the file, where it is written already."""
        self.recipe = self.recipe.with_scores(scores)
        if (self.folder / self.recipe.FILE).is_file():
            self.save_pretrained(self.folder)


def opened(data: Any) -> tuple[list[Any], list[PanopticMap], tuple[str, str]]:
    """Images, their maps, and the names of data set and split.

    Args:
        data: `PanopticTrainData`, or `(images, maps)`, which count as the split `test` of `given`.

    Raises:
        ValueError: For other numbers of images and maps, and none.
    """
    if isinstance(data, PanopticTrainData):
        rows = [data[at] for at in range(len(data))]
        images = list(to_unit(torch.stack([row["pixel_values"] for row in rows])) / 2 + 0.5)
        truth = to_maps(*(torch.stack([row[key] for row in rows]) for key in ("panoptic", "segment_classes")))
        return images, truth, (public_name(str(data.config.dataset_name)), data.config.dataset_split)
    images, truth = (list(part) for part in data)
    if not images or len(images) != len(truth):
        raise ValueError(f"{len(images)} images and {len(truth)} maps; one map an image is needed, and one at least.")
    return images, truth, ("given", "test")


def words_of(data: Any, trained_on: Vocabulary) -> Vocabulary:
    """The vocabulary that data are numbered by: their classes, with the synonyms that the training had.

    Data without names of classes are numbered by the vocabulary of the training.
    """
    names = getattr(data, "class_names", None)
    if names is None:
        return trained_on
    known = {one[0]: one for one in trained_on.classes}
    stuff = {trained_on.names[at] for at in trained_on.stuff} | {data.config.ground}
    return Vocabulary.of([known.get(name, (name,)) for name in names], [name for name in names if name in stuff])


def scores_of(measured: Mapping[str, float], dataset: str, split: str) -> list[Score]:
    """What a recipe keeps of `PanopticPredictor.measure`."""
    rows = int(measured["rows"])
    return [Score(name, measured[name], dataset, split, rows) for name in MEASURES if name in measured]


def make_objective(
    denoiser: Denoiser, towers: ImageTextEncoder, data: PanopticTrainData, odise: OdiseConfig, training: TrainingConfig
) -> tuple[OdiseObjective, RecipeFile]:
    """What is trained, and the recipe that is saved with it.

    Args:
        denoiser: The base.
        towers: CLIP.
        data: To train on.
        odise: The head.
        training: The run.

    Raises:
        TypeError, ValueError: For a base without text or maps, synonyms of what is no class, and names that are none.
    """
    ground = data.config.ground
    words = odise.vocabulary(data.class_names, [] if ground is None else [ground])
    torch.manual_seed(training.seed)
    objective = OdiseObjective(denoiser, towers, words, odise)
    recipe = PanopticRecipe.make(
        objective.head,
        denoiser,
        towers,
        words,
        template=odise.template,
        protocol={
            "name": "odise",
            "version": 1,
            "source": "Loss and matching of Mask2Former (arXiv 2112.01527), as in ODISE (arXiv 2303.04803).",
            "steps": training.max_train_steps,
            "batch_size": training.train_batch_size,
            "learning_rate": training.learning_rate,
            "points": odise.points,
            "seed": training.seed,
        },
        train={
            "dataset": public_name(str(data.config.dataset_name)),
            "split": data.config.dataset_split,
            "rows": len(data),
        },
    )
    file = RecipeFile(recipe, training.output_dir)
    objective.beside = (FixedArtifact(file),)
    return objective, file


__all__ = ["MEASURES", "RecipeFile", "make_objective", "opened", "scores_of", "words_of"]
