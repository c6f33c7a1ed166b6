"""`ZeroShotClassifier`: which class an image is of, by the errors of a conditional diffusion model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import Labelled
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.images import image_items
from diffusers_repr.features.noise_policy import image_keys
from diffusers_repr.hub.places import public_name
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.tasks import files
from diffusers_repr.tasks.base import record_base
from diffusers_repr.tasks.denoising_errors.calibration import Criterion, class_errors
from diffusers_repr.tasks.denoising_errors.classes import TEMPLATE, ZeroShotClasses
from diffusers_repr.tasks.denoising_errors.conditions import ConditionRows, encode_conditions
from diffusers_repr.tasks.denoising_errors.crops import check_resize, sized_pixels
from diffusers_repr.tasks.denoising_errors.learned import learned_rule
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.likelihood import class_probabilities
from diffusers_repr.tasks.denoising_errors.network import NetworkErrors
from diffusers_repr.tasks.denoising_errors.output import ZeroShotOutput
from diffusers_repr.tasks.denoising_errors.presets import rule_and_loss
from diffusers_repr.tasks.denoising_errors.racing import Racing
from diffusers_repr.tasks.denoising_errors.rules import Averaging, Decisions, Rule, Units, join_decisions
from diffusers_repr.tasks.denoising_errors.scores import check_bound, check_loss
from diffusers_repr.tasks.folder_task import FolderTask
from diffusers_repr.tasks.formats import ZERO_SHOT
from diffusers_repr.tasks.images import class_accuracies, class_data
from diffusers_repr.tasks.levels import PACKAGES, recorded_levels
from diffusers_repr.tasks.recipe import Score
from diffusers_repr.tasks.zero_shot_recipe import ZeroShotRecipe

_ELEMENTS = 1 << 22  # of an array of all pairs of units, images decided together are kept within


class ZeroShotClassifier(FolderTask):
    """Compares denoising errors under the conditions of classes (Diffusion Classifier, arXiv 2303.16203).

    The class under which a text-to-image or class-conditional model estimates the noise best is the image's. All
    classes see the same noise at the same levels. Made by `of`, without any labelled image; by `fit`, which learns
    from a few which levels tell most; or by `from_pretrained`.

    Args:
        recipe: Classes, rule and all else.
        denoiser: The base model.
        batch_size: Rows of one forward; smaller, with a warning, where memory does not suffice.
    """

    FORMAT = ZERO_SHOT
    recipe: ZeroShotRecipe

    def __init__(self, recipe: ZeroShotRecipe, denoiser: Denoiser, batch_size: int = 64) -> None:
        recipe.classes.check(denoiser)
        if recipe.loss == "vlb":
            check_bound(denoiser)
        super().__init__(None, recipe, denoiser, batch_size)
        self._conditions: tuple[Any, ConditionRows] | None = None

    @classmethod
    def of(
        cls,
        source: Any,
        classes: Any = None,
        *,
        template: str | Sequence[str] = TEMPLATE,
        rule: str | Rule = "racing",
        loss: str | None = None,
        ensemble: str = "mean",
        image_size: Any = None,
        resize: str = "crop",
        seed: int = 0,
        batch_size: int = 64,
        base: str | None = None,
        base_revision: str | None = None,
    ) -> ZeroShotClassifier:
        """A classifier of images among classes.

        Args:
            source: A `Denoiser` or a diffusers pipeline with a condition.
            classes: See `ZeroShotClasses.of`: names, names with prompts, ids; None: all of a class-conditional model.
            template: Puts names into words; several give several prompts a class.
            rule: `racing` (ours: a sequential test with a stated error probability), `averaging`, a data set of the
                paper's schedules (`cifar10`, `pets`, `imagenet`, ...), or a `Rule`.
            loss: `l2`, `l1`, `huber` or `vlb`; the preset's, else `l2`, if None.
            ensemble: How several prompts of a class count: `mean`, or `best` as in the paper's code.
            image_size: (H, W) or one side, in pixels; the model's own if None.
            resize: `crop`: the shorter side is brought to size and the middle taken; `stretch`.
            seed: Of the noise.
            batch_size: Rows of one forward.
            base: Hub id or folder to write as the base, if not the one the model was loaded from.
            base_revision: Goes with `base`.

        Raises:
            ValueError: For a base without condition; as `ZeroShotClasses`; for names that there are not, and the loss
                `vlb` of a base that learned its variance.
        """
        denoiser = source if isinstance(source, Denoiser) else Denoiser.from_pipe(source)
        found = ZeroShotClasses.of(denoiser, classes, template)
        chosen, loss = rule_and_loss(rule, loss)
        check_loss(loss)
        check_resize(resize)
        Units.of(found.of_value, ensemble)  # type: ignore[arg-type]
        size = denoiser.resize_to(image_size)
        if size is None:
            raise ValueError("image_size='keep' is not for classification: all images are brought to one size.")
        recipe = ZeroShotRecipe(
            base=record_base(denoiser, {}, base, base_revision),
            classes=found,
            rule=chosen,
            loss=loss,
            ensemble=ensemble,
            seed=seed,
            image_size=size,
            resize=resize,
            levels=_reference_levels(denoiser.schedule),
            calibration=None,
            train=None,
            scores=(),
            versions={name: importlib.metadata.version(name) for name in PACKAGES},
        )
        return cls(recipe, denoiser, batch_size)

    @classmethod
    def fit(
        cls,
        source: Any,
        train: Any,
        validation: Any = None,
        *,
        classes: Any = None,
        rule: str | Rule = "calibrated",
        error: float | None = None,
        candidates: int = 16,
        draws: int = 2,
        criterion: Criterion = "bits",
        progress_bar: Callable[..., Any] | None = None,
        **settings: Any,
    ) -> ZeroShotClassifier:
        """As `of`, and learn from a few labelled images which levels tell most, and what errors mean as probabilities.

        It evaluates `images x prompts x candidates x draws` rows. No weight changes.

        Args:
            source: As for `of`.
            train: `ImageData`, a `datasets.Dataset`, or `(images, labels)` with ids in the order of the classes.
            validation: The same, to measure on.
            classes: As for `of`; None of a text model: the names of the data's classes.
            rule: `calibrated`: `CalibratedRacing` with what is learned. `racing`, `averaging` or a `Rule` of these
                take their levels from it, the most telling first.
            error: Of `calibrated`: probability that it eliminates the true class, 0.01 if None; of `racing`: see
                `Racing`.
            candidates: Levels that are tried, evenly spread.
            draws: Of noise, at each.
            criterion: See `rank_levels`.
            progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`.
            **settings: As for `of`.

        Raises:
            ValueError: As `of`; for labels that are not the classes', images of one class alone, and a schedule of the
                paper's, which nothing can be learned for. A warning tells of classes without images.
        """
        data = class_data(train, "train")
        if classes is None and data.label_names is not None and _argument(source) == "prompt":
            classes = list(data.label_names)
        calibrated = rule == "calibrated"
        if error is not None and rule not in ("calibrated", "racing"):
            raise ValueError(f"error= is of rule 'calibrated' or 'racing'; {rule!r} has none, or its own.")
        racing = Racing() if error is None else Racing(error=error)
        made = cls.of(source, classes, rule=racing if calibrated or rule == "racing" else rule, **settings)
        if not isinstance(made.recipe.rule, (Racing, Averaging)):
            raise ValueError("The paper's schedules have levels of their own; fit is for racing and averaging.")
        made.recipe.classes.check_labels(data)
        levels = even_timesteps(made.denoiser.schedule, candidates)
        if made.recipe.loss == "vlb":
            levels = [level for level in levels if made.denoiser.schedule.kind != "vp" or level >= 1]
        units = Units.of(made.recipe.classes.of_value, made.recipe.ensemble)  # type: ignore[arg-type]
        errors = class_errors(made._errors(data, draws * candidates, progress_bar), units, len(data), levels, draws)
        new, learned = learned_rule(
            "calibrated" if calibrated else made.recipe.rule, errors, data.targets, levels, criterion, error
        )
        told = {"dataset": public_name(data.name), "split": data.split, "rows": len(data), "criterion": criterion}
        made.recipe = dataclasses.replace(made.recipe, rule=new, calibration=learned, train=told)
        if validation is not None:
            made.evaluate(class_data(validation, "validation"))
        return made

    def __call__(self, images: Any, *, ids: Sequence[Any] | None = None) -> ZeroShotOutput:
        """Classify images.

        Args:
            images: PIL images, numpy arrays or tensors of any size.
            ids: Keys of the noise, one an image; the pixels if None, so that one image always gets the same.

        Raises:
            ValueError: Without images, and if the estimates of the noise point away from it: the base was not
                trained for its scheduler, such as one of EDM without its preconditioning.
            FloatingPointError: If errors are no numbers.
            MemoryError: If memory does not suffice for a single row.
        """
        items = image_items(images)
        if not items:
            raise ValueError("No images: the list is empty. Pass at least one PIL image, array or tensor.")
        pixels = sized_pixels(items, self.denoiser, self.recipe.image_size, self.recipe.resize)
        return self.output(self.decide(pixels, image_keys(ids, pixels)))

    def decide(
        self, pixels: Tensor, keys: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> list[Decisions]:
        """What the rule finds of images at the network's size, some at a time.

        Args:
            pixels: `(N, C, H, W)` in [-1, 1].
            keys: Of their noise.
            progress: Called with a number of images when they are done.
        """
        recipe, units, found = self.recipe, self._units(), []
        levels = recipe.rule.levels(self.denoiser.schedule)
        together = max(1, min(64, _ELEMENTS // len(units) ** 2))
        for start in range(0, len(pixels), together):
            rows = slice(start, start + together)
            network = self.network(pixels[rows], keys[rows])
            found.append(recipe.rule(network, units, len(pixels[rows]), levels))
            self.batch_size = network.batch_size
            if progress is not None:
                progress(len(pixels[rows]))
        return found

    def network(
        self, pixels: Tensor, keys: Sequence[str], progress: Callable[[int], None] | None = None
    ) -> NetworkErrors:
        """What gives the errors of images and prompts; see `NetworkErrors`.

        Args:
            pixels: `(N, C, H, W)` in [-1, 1], of the recipe's size.
            keys: Of their noise.
            progress: Called with the rows of each forward.
        """
        parts = [self.denoiser.encode_pixels(pixels[at : at + 8]).cpu() for at in range(0, len(pixels), 8)]
        return NetworkErrors(
            self.denoiser,
            torch.cat(parts),
            keys,
            self.conditions(),
            self.recipe.loss,
            self.recipe.seed,
            self.batch_size,
            progress,
        )

    def conditions(self) -> ConditionRows:
        """The prompts, encoded once, or the ids."""
        classes, key = self.recipe.classes, (id(self.denoiser.model), self.denoiser.device)
        if self._conditions is None or self._conditions[0] != key:
            kind = "prompts" if classes.prompts is not None else "class_labels"
            given: dict[str, Any] = {kind: classes.values}
            size, batch = self.recipe.image_size, self.batch_size
            self._conditions = key, encode_conditions(self.denoiser, **given, size=size, batch_size=batch)
        return self._conditions[1]

    def output(self, parts: Sequence[Decisions]) -> ZeroShotOutput:
        """Decisions of one batch after another, as what a call gives."""
        joined, units = join_decisions(parts), self._units()
        calibration, names = self.recipe.calibration, self.recipe.label_names
        chances = torch.empty(0)
        if joined.log_odds is not None:
            chances = class_probabilities(joined.log_odds, units.classes)
        elif calibration is not None and calibration.scale is not None:
            chances = torch.softmax(-calibration.scale * joined.errors, 1)
        return ZeroShotOutput(
            [names[place] for place in joined.labels.tolist()],
            joined.labels,
            joined.errors,
            joined.confidence if joined.log_odds is None else chances.gather(1, joined.labels[:, None])[:, 0],
            chances if len(chances) else None,
            joined.decided,
            joined.evaluations,
            names,
            joined.asked,
            joined.pair_errors,
            torch.tensor(self.recipe.classes.of_value),
        )

    def evaluate(
        self,
        data: Any,
        *,
        record: bool = True,
        dataset: str | None = None,
        split: str | None = None,
        progress_bar: Callable[..., Any] | None = None,
    ) -> dict[str, float]:
        """Accuracy, its mean over the classes that have images (`balanced_accuracy`), and what it took.

        Args:
            data: `ImageData`, a `datasets.Dataset`, or `(images, labels)` with ids in the order of the classes; a
                tuple counts as the split `test`.
            record: Keep accuracies in the recipe, so that they are saved and stand in the card.
            dataset: Name to record; that of the data if None.
            split: Split to record; that of the data if None.
            progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`.

        Returns:
            `accuracy`, `balanced_accuracy`, `evaluations` (the mean over images), `rows`; of races also `decided`, the
            share that ended by their test.

        Raises:
            ValueError: If the data's classes are not these. A warning tells of classes without images.
        """
        found = class_data(data, "test")
        self.recipe.classes.check_labels(found)
        bar = None if progress_bar is None else progress_bar(total=len(found))
        try:
            parts: list[Decisions] = []
            for _, images in found.batches(64):
                items = image_items(images)
                pixels = sized_pixels(items, self.denoiser, self.recipe.image_size, self.recipe.resize)
                parts += self.decide(pixels, image_keys(None, pixels), None if bar is None else bar.update)
        finally:
            if bar is not None:
                bar.close()
        output = self.output(parts)
        result = class_accuracies(output.ids, found.targets)
        if record:
            for name, value in result.items():
                self.record(Score(name, value, dataset or public_name(found.name), split or found.split, len(found)))
        if output.decided is not None:
            result["decided"] = float(output.decided.double().mean())
        return {**result, "evaluations": float(output.evaluations.double().mean()), "rows": len(found)}

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        base: Any = None,
        revision: str | None = None,
        *,
        base_revision: str | None = None,
        token: str | None = None,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> ZeroShotClassifier:
        """Load a classifier and its base model.

        Args:
            id_or_folder: What `save_pretrained` wrote, or a Hub id.
            base: A folder, Hub id, pipeline or `Denoiser` to take instead of the recorded base.
            revision: Of the classifier: branch, tag or commit.
            base_revision: Of `base`.
            token: Hub token, for the classifier and the base.
            batch_size: Rows of one forward.
            **kwargs: For loading the base (`dtype`, `variant`, ...).

        Raises:
            FileNotFoundError: If there is no such folder, classifier or base folder.
            ValueError: If a file is damaged, or the base is another network, or has another noise process, than the
                classifier was made for. Other weights are warned of.
            OSError: If the Hub does not give the classifier or the base.
        """
        if token is not None:
            kwargs["token"] = token
        _, recipe, denoiser = files.load(ZERO_SHOT, id_or_folder, base, revision, base_revision, token, kwargs)
        return cls(recipe, denoiser, batch_size)

    def _units(self) -> Units:
        return Units.of(self.recipe.classes.of_value, self.recipe.ensemble)  # type: ignore[arg-type]

    def _errors(self, data: Labelled, times: int, progress_bar: Callable[..., Any] | None) -> NetworkErrors:
        """The errors of all images of a data set."""
        items = [item for _, images in data.batches(64) for item in image_items(images)]
        pixels = sized_pixels(items, self.denoiser, self.recipe.image_size, self.recipe.resize)
        total = len(pixels) * len(self.recipe.classes.values) * times
        bar = None if progress_bar is None else progress_bar(total=total)
        return self.network(pixels, image_keys(None, pixels), None if bar is None else bar.update)

    def __repr__(self) -> str:
        recipe = self.recipe
        return (
            f"ZeroShotClassifier({len(recipe.classes)} classes, {recipe.rule!r}, loss={recipe.loss!r}, "
            f"base={recipe.base.name!r}, image_size={recipe.image_size})"
        )


def _reference_levels(schedule: NoiseSchedule) -> Any:
    return recorded_levels([schedule.resolve(value) for value in even_timesteps(schedule, 3)], None)


def _argument(source: Any) -> str:
    denoiser = source if isinstance(source, Denoiser) else Denoiser.from_pipe(source)
    return denoiser.conditioner.argument


__all__ = ["ZeroShotClassifier"]
