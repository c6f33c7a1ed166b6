"""Running evaluations: seed after seed, each one whole on disk before the next, so that a kill loses one at most."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusers_repr.config.recipe import read_recipe, to_yaml
from diffusers_repr.hub.files import atomic_folder, atomic_write, only_writer, read_json, write_json
from diffusers_repr.tasks.evaluation.bases import Bases
from diffusers_repr.tasks.evaluation.plan import Plan, make_plan
from diffusers_repr.tasks.evaluation.recipe import EvaluationRecipe
from diffusers_repr.tasks.evaluation.report import summary, write_report

RECIPE, RESULT = "recipe.yaml", "result.json"


def evaluate_recipe(
    recipe: EvaluationRecipe,
    folder: str | Path,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    progress_bar: Callable[..., Any] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Check a recipe, fit and measure with every seed, and write what came of it.

    The folder gets `seed-N/` for every seed (`task/`, which `from_pretrained` loads; of the first one `pictures/`),
    `metrics.json`, a card and the recipe. Seeds that are there are not run again.

    Args:
        recipe: See `read_evaluation`.
        folder: A new one, or one with an evaluation of this recipe.
        device: Where the base runs.
        overwrite: Replace an evaluation of another recipe.
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`.
        tell: Is told what is done, in lines.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: For what is not right in the recipe; names file and key.
        FileExistsError: If the folder holds something else, or an evaluation of another recipe.
    """
    return run_plan(make_plan(recipe), Path(folder), Bases(device), overwrite, progress_bar, tell)


def evaluate_recipes(
    recipes: Sequence[EvaluationRecipe],
    folders: Sequence[Path],
    device: str,
    overwrite: bool,
    progress_bar: Callable[..., Any] | None,
    tell: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Several of them, all checked before the first is run; the arguments are those of `evaluate_recipe`."""
    bases = Bases(device)
    plans = [make_plan(recipe) for recipe in recipes]
    for plan, folder in zip(plans, folders, strict=True):
        _open_folder(plan, folder, overwrite, look=True)
    for plan in sorted(plans, key=lambda plan: plan.recipe.base_name):  # a base is loaded once
        plan.check_base(bases.get(plan.recipe, plan.kind.base))
    pairs = zip(plans, folders, strict=True)
    return [run_plan(plan, folder, bases, overwrite, progress_bar, tell) for plan, folder in pairs]


def run_plan(
    plan: Plan,
    folder: Path,
    bases: Bases,
    overwrite: bool,
    progress_bar: Callable[..., Any] | None,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """As `evaluate_recipe`, of a checked recipe.

    Args:
        plan: The recipe, checked.
        folder: As in `evaluate_recipe`.
        bases: Of which the base is taken.
        overwrite: Likewise.
        progress_bar: Likewise.
        tell: Likewise.
    """
    recipe, seeds = plan.recipe, plan.recipe.seeds
    _open_folder(plan, folder, overwrite, look=True)
    missing = [seed for seed in seeds if overwrite or not (folder / f"seed-{seed}" / RESULT).is_file()]
    if missing:
        plan.check_base(bases.get(recipe, plan.kind.base))
    with only_writer(folder, "evaluate"):
        _open_folder(plan, folder, overwrite)
        for seed in seeds:
            if (folder / f"seed-{seed}" / RESULT).is_file():
                tell(f"{recipe.name}, seed {seed}: is there")
                continue
            with atomic_folder(folder / f"seed-{seed}") as fresh:
                found = _run_seed(plan, bases, seed, fresh, progress_bar, pictures=seed == seeds[0])
            tell(f"{recipe.name}, seed {seed}: {_line(found, plan)}")
        results = [read_json(folder / f"seed-{seed}" / RESULT) for seed in seeds]
        told = summary(plan, results)
        write_report(plan, told, folder)
    return told


def _run_seed(
    plan: Plan, bases: Bases, seed: int, folder: Path, progress_bar: Callable[..., Any] | None, pictures: bool
) -> dict[str, Any]:
    began = time.perf_counter()
    task = plan.fitted(bases.get(plan.recipe, plan.kind.base), seed, progress_bar)
    if plan.recipe.load is not None:
        task.to(bases.device)
    fitted = time.perf_counter()
    measured = plan.measured(task, progress_bar)
    done = time.perf_counter()
    task.save_pretrained(folder / "task", title=f"{plan.recipe.name}, seed {seed}")
    if pictures and plan.kind.pictures is not None:
        (folder / "pictures").mkdir()
        for name, picture in plan.kind.pictures(task, next(iter(plan.splits.values()))).items():
            picture.save(folder / "pictures" / f"{name}.png")
    seconds = {"fit": round(fitted - began, 3), "measure": round(done - fitted, 3)}
    found = {"seed": seed, "measured": measured, "seconds": seconds}
    write_json(folder / RESULT, found)
    return found


def _open_folder(plan: Plan, folder: Path, overwrite: bool, look: bool = False) -> None:
    """The folder with this recipe in it; `look` only tells whether it may be written to.

    Raises:
        FileExistsError: If it holds something else.
    """
    own = folder / RECIPE
    if own.is_file():
        differing = plan.recipe.differing(read_recipe(own))
        if differing and not overwrite:
            raise FileExistsError(
                f"{str(folder)!r} holds an evaluation of another recipe; nothing was changed. What differs (there -> "
                f"now): {'; '.join(differing)}. Name another folder, or add overwrite (--overwrite) to replace it."
            )
        if overwrite and not look:
            for old in folder.glob("seed-*"):
                shutil.rmtree(old)
    elif folder.is_dir() and any(not one.name.startswith(".") for one in folder.iterdir()):
        raise FileExistsError(
            f"{str(folder)!r} is not empty and holds no evaluation (no {RECIPE}). Name a new folder; what is in this "
            "one stays as it is."
        )
    if not look:
        for left in folder.glob(".seed-*"):  # by a kill
            shutil.rmtree(left)
        atomic_write(own, to_yaml(plan.recipe.to_dict()))


def _line(found: dict[str, Any], plan: Plan) -> str:
    parts = []
    for split, values in found["measured"].items():
        name = plan.headline or next(iter(values))
        parts.append(f"{split} {name} {values[name]:.4f}")
    return f"{', '.join(parts)} in {sum(found['seconds'].values()):.1f} s"


__all__ = ["RECIPE", "evaluate_recipe", "evaluate_recipes", "run_plan"]
