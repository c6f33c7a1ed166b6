"""`Plan`: a recipe with all that it names found and checked, before there is work to lose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_repr.capture import check_layers
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.hub.errors import is_repo_id
from diffusers_repr.tasks.evaluation.bases import DENOISER
from diffusers_repr.tasks.evaluation.data import first_rows
from diffusers_repr.tasks.evaluation.options import checked, keywords, naming, takes_settings
from diffusers_repr.tasks.evaluation.recipe import EvaluationRecipe
from diffusers_repr.tasks.evaluation.registry import TaskKind, task_kind
from diffusers_repr.tasks.evaluation.sources import Reading, SourceMaker, find_source
from diffusers_repr.tasks.task import Task

_GIVEN_TO_FIT = ("seed", "batch_size", "progress_bar", "base", "base_revision", "source", "train", "validation")
_GIVEN_TO_MEASURE = ("record", "dataset", "split", "progress_bar")


@dataclass(frozen=True)
class Plan:
    """A checked recipe.

    Attributes:
        recipe: As read.
        kind: Of its task.
        task: Class of the task.
        maker: Of its source; None: the task reads the base by itself.
        source: Arguments of the maker.
        fit: Arguments of `fit`.
        measure: Arguments of `evaluate`.
        train: What is learned from; None for a task that learns nothing.
        validation: What is tuned on, if anything.
        splits: Name -> what is measured on.
        train_limit: Of `train`, drawn by each seed; None: all.
    """

    recipe: EvaluationRecipe
    kind: TaskKind
    task: type[Task]
    maker: SourceMaker | None
    source: Mapping[str, Any]
    fit: Mapping[str, Any]
    measure: Mapping[str, Any]
    train: Any
    validation: Any
    splits: Mapping[str, Any]
    train_limit: int | None

    @property
    def headline(self) -> str | None:
        """The measure that tables show; None: the first."""
        return self.kind.headline

    def reading(self, base: Any) -> Reading:
        """What the task is fitted on."""
        if self.maker is None:
            return Reading(base, {})
        with naming(f"{self.recipe.file}: source"):
            return self.maker(base, **self.source)

    def check_base(self, base: Any) -> None:
        """Refuse layers and levels that the base does not have; nothing is run.

        Args:
            base: That the recipe names, trained; None: nothing is checked.

        Raises:
            ValueError: Names the key.
        """
        if base is None:
            return
        found = self.reading(self.kind.base.untrained(base, 0) if self.recipe.random else base)
        layers, timestep = found.settings.get("layers"), found.settings.get("timestep")
        if layers is not None:
            with naming(f"{self.recipe.file}: source.layers"):
                check_layers(base.model, layers)
        if timestep is not None:
            with naming(f"{self.recipe.file}: source.timesteps"):
                for step in timestep if isinstance(timestep, list) else [timestep]:
                    base.level(step)

    def fitted(self, base: Any, seed: int, progress_bar: Callable[..., Any] | None = None) -> Task:
        """The task, fitted with a seed, or loaded.

        Args:
            base: That the recipe names, trained; None: that of the saved task.
            seed: Of noise, fitting, the images that are drawn, and the weights of an untrained network.
            progress_bar: As in `fit` of the task.
        """
        if self.recipe.load is not None:
            return self._loaded(base)
        assert base is not None
        reading = self.reading(self.kind.base.untrained(base, seed) if self.recipe.random else base)
        named, further = keywords(self.task.fit), takes_settings(self.task.fit)
        given = {"seed": seed, "progress_bar": progress_bar, "batch_size": self.recipe.batch_size}
        own = {k: v for k, v in given.items() if v is not None and (k in named or (further and k != "progress_bar"))}
        if not isinstance(reading.source, Denoiser) and "batch_size" not in named:
            own.pop("batch_size", None)  # such a source has one of its own
        train = self.train
        if train is not None and self.train_limit is not None:
            train = first_rows(train, self.train_limit, seed)
        return self.task.fit(reading.source, train, self.validation, **{**own, **self.fit, **reading.settings})

    def _loaded(self, base: Any) -> Task:
        assert self.recipe.load is not None
        own: dict[str, Any] = {}
        if self.maker is not None and base is not None:
            own["source"] = self.reading(base).source
        if self.recipe.batch_size is not None:
            own["batch_size"] = self.recipe.batch_size
        with naming(f"{self.recipe.file}: load"):
            return self.task.from_pretrained(self.recipe.load, base, **own)

    def measured(self, task: Task, progress_bar: Callable[..., Any] | None = None) -> dict[str, dict[str, float]]:
        """The measures of a task on every split.

        Args:
            task: That `fitted` gave.
            progress_bar: As in `evaluate` of the task.
        """
        named, found = keywords(self.task.evaluate), {}
        for split, data in self.splits.items():
            given: dict[str, Any] = {"split": split, "progress_bar": progress_bar}
            own = {key: value for key, value in given.items() if key in named and value is not None}
            found[split] = task.evaluate(data, **own, **self.measure)
        return found


def make_plan(recipe: EvaluationRecipe) -> Plan:
    """Find and check what a recipe names; data are opened, no model is loaded.

    Raises:
        ValueError, TypeError: For keys, names and values that are not right; names file and key.
        FileNotFoundError: For a base or data that are not there.
        ImportError: For an extra that is missing.
    """
    file = recipe.file
    with naming(f"{file}: task"):
        kind = task_kind(recipe.task)
        task = kind.task()
    maker, source = None, {}
    if recipe.source is not None and kind.base is not DENOISER:
        raise ValueError(f"{file}: source: the task {recipe.task} reads its base, an encoder, as it is; leave it out.")
    if recipe.source is not None:
        given = dict(recipe.source)
        with naming(f"{file}: source.name"):
            maker = find_source(str(given.pop("name", "plain")))
        source = checked(f"{file}: source", given, maker)
    settings = kind.settings
    fit = checked(f"{file}: fit", recipe.fit, settings or task.fit, () if settings else _GIVEN_TO_FIT)
    if settings is not None:
        with naming(f"{file}: fit"):
            fit = settings(**fit)
    measure = checked(f"{file}: measure", recipe.measure, task.evaluate, _GIVEN_TO_MEASURE)
    _check_there(recipe, kind)
    opened = _open(recipe, kind, recipe.load is None and _needs_train(task))
    return Plan(recipe, kind, task, maker, source, fit, measure, **opened)


def _needs_train(task: type[Task]) -> bool:
    import inspect

    train = inspect.signature(task.fit).parameters.get("train")
    return train is not None and train.default is train.empty


def _check_there(recipe: EvaluationRecipe, kind: TaskKind) -> None:
    """Refuse a base or a saved task that is neither there nor may be a Hub id."""
    if recipe.load is not None and not Path(recipe.load).expanduser().is_dir() and not is_repo_id(recipe.load):
        raise FileNotFoundError(
            f"{recipe.file}: load: {recipe.load!r} is not here. Give a saved task's folder or Hub id."
        )
    if recipe.base is not None:
        with naming(f"{recipe.file}: base"):
            kind.base.check(recipe.base_name)


def data_section(
    *,
    path: str,
    train: str | None = None,
    validation: str | None = None,
    measure: str | list[str] = "test",
    train_limit: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The keys of the section `data` that all tasks have.

    Args:
        path: Of the data set.
        train: Split to learn from.
        validation: Split to tune on.
        measure: Splits to measure on.
        train_limit: Rows of `train` that each seed draws.
        limit: Rows of every split, for a quick try.
    """
    splits = [measure] if isinstance(measure, str) else list(measure)
    for name, value in (("train_limit", train_limit), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is a number of rows, at least 1; got {value}.")
    if not splits:
        raise ValueError("measure is empty; name a split to measure on.")
    shared = [split for split in splits if split in (train, validation)]
    if shared:
        raise ValueError(f"{shared[0]!r} is learned from and measured on; name another split in measure.")
    return {"path": path, "train": train, "validation": validation, "measure": splits,
            "train_limit": train_limit, "limit": limit}  # fmt: skip


def _open(recipe: EvaluationRecipe, kind: TaskKind, needs_train: bool) -> dict[str, Any]:
    """The splits, and how many rows to learn from."""
    place, common = f"{recipe.file}: data", keywords(data_section)
    own = {key: value for key, value in recipe.data.items() if key not in common}
    options = checked(place, own, kind.open)
    given = checked(place, {key: recipe.data[key] for key in recipe.data if key in common}, data_section)
    with naming(place):
        told = data_section(**{"train": "train" if needs_train else None, **given})

    def split(key: str, name: str | None) -> Any:
        if name is None:
            return None
        with naming(f"{place}.{key}"):
            found = kind.open(told["path"], name, **options)
            return found if told["limit"] is None else first_rows(found, told["limit"], 0)

    train, validation = (split(key, told[key]) for key in ("train", "validation"))
    splits = {name: split("measure", name) for name in told["measure"]}
    return {"train": train, "validation": validation, "splits": splits, "train_limit": told["train_limit"]}


__all__ = ["Plan", "data_section", "make_plan"]
