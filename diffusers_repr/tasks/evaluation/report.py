"""What an evaluation leaves: `metrics.json`, a card, and of several one table."""

from __future__ import annotations

import importlib.metadata
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers_repr.config.recipe import to_yaml
from diffusers_repr.hub.files import atomic_files
from diffusers_repr.hub.places import public_name, without_places
from diffusers_repr.hub.schema import printable
from diffusers_repr.tasks.evaluation.plan import Plan
from diffusers_repr.tasks.evaluation.recipe import EvaluationRecipe
from diffusers_repr.tasks.levels import PACKAGES

METRICS, TABLE = "metrics.json", "table"


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 of one value), lowest, highest, and the values themselves.

    Example:
        >>> spread([1.0, 2.0, 3.0])
        {'mean': 2.0, 'std': 1.0, 'min': 1.0, 'max': 3.0, 'seeds': [1.0, 2.0, 3.0]}
    """
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.fmean(values)
    return {"mean": mean, "std": std, "min": min(values), "max": max(values), "seeds": list(values)}


def summary(plan: Plan, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `metrics.json` holds.

    Args:
        plan: The recipe, checked.
        results: Of its seeds, in their order.
    """
    measured: dict[str, dict[str, Any]] = {}
    for split in results[0]["measured"]:
        names = list(dict.fromkeys(name for one in results for name in one["measured"][split]))
        rows = {name: [r["measured"][split][name] for r in results if name in r["measured"][split]] for name in names}
        measured[split] = {name: spread(values) for name, values in rows.items()}
    headline = plan.headline or next(iter(next(iter(measured.values()))))
    seconds = {part: spread([one["seconds"][part] for one in results]) for part in results[0]["seconds"]}
    return {
        "name": plan.recipe.name,
        "headline": headline,
        "measured": measured,
        "seeds": [one["seed"] for one in results],
        "seconds": seconds,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "recipe": without_places(plan.recipe.to_dict()),
    }


def write_report(plan: Plan, told: Mapping[str, Any], folder: Path) -> None:
    """Write `metrics.json` and the card, both or none.

    Args:
        plan: The recipe, checked.
        told: Of `summary`.
        folder: Of the evaluation.
    """
    atomic_files(folder, {METRICS: json.dumps(told, indent=2) + "\n", "README.md": _card(plan, told, folder)})


def _card(plan: Plan, told: Mapping[str, Any], folder: Path) -> str:
    recipe, seeds = plan.recipe, told["seeds"]
    lines = [
        f"# {printable(recipe.name)}",
        "",
        f"{recipe.task.capitalize()} on {_base(recipe)}, features: {printable(recipe.reads)}. "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}: {', '.join(map(str, seeds))}.",
    ]
    for split, found in told["measured"].items():
        lines += ["", f"## Measured on {printable(split)}", "", "| measure | mean | std | lowest | highest |",
                  "|---|---|---|---|---|"]  # fmt: skip
        for name, one in found.items():
            cells = (f"{one[key]:.4f}".rstrip("0").rstrip(".") for key in ("mean", "std", "min", "max"))
            lines.append(f"| {printable(name)} | {' | '.join(cells)} |")
    pictures = sorted((folder / f"seed-{seeds[0]}" / "pictures").glob("*.png"))
    if pictures:
        lines += ["", "## Pictures", "", f"Of seed {seeds[0]}."]
        lines += ["", *(f"![{path.stem}]({path.relative_to(folder).as_posix()})\n" for path in pictures)]
    fit, measure = (told["seconds"][part]["mean"] for part in ("fit", "measure"))
    lines += [
        "",
        "## Load it",
        "",
        "```python",
        f"from {plan.task.__module__} import {plan.task.__name__}",
        "",
        f'task = {plan.task.__name__}.from_pretrained("path/to/this/folder/seed-{seeds[0]}/task")',
        "```",
        "",
        "## Recipe",
        "",
        "```yaml",
        to_yaml(told["recipe"]).rstrip(),
        "```",
        "",
        f"{fit:.1f} s to fit and {measure:.1f} s to measure, a seed. "
        + ", ".join(f"{name} {version}" for name, version in told["versions"].items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def _base(recipe: EvaluationRecipe) -> str:
    if recipe.base is None:
        return f"the base of `{printable(public_name(str(recipe.load)))}`"
    random = "the random weights of " * recipe.random
    return f"{random}`{printable(public_name(recipe.base_name))}`"


def table_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for every evaluation and split it was measured on.

    Args:
        found: Of each evaluation what `summary` gave.
    """
    rows = []
    for told in found:
        recipe = told["recipe"]
        own = EvaluationRecipe(**{"file": "", **recipe, "seeds": tuple(recipe["seeds"])})
        settings = ", ".join(f"{key} {value}" for key, value in own.measure.items())
        for split, measured in told["measured"].items():
            one = measured[told["headline"]]
            rows.append(
                {
                    "name": told["name"],
                    "task": own.task,
                    "base": own.base or f"of {own.load}",
                    "features": own.reads,
                    "data": f"{own.data['path']} ({split})",
                    "measure": told["headline"] + (f" ({settings})" if settings else ""),
                    **{key: one[key] for key in ("mean", "std", "min", "max")},
                    "seeds": len(told["seeds"]),
                    "seconds": round(sum(part["mean"] for part in told["seconds"].values()), 2),
                }
            )
    return rows


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `table_rows` as a table of Markdown.

    Args:
        rows: Of the table.
    """
    heads = ("", "task", "base", "features", "data", "measure", "mean ± std", "lowest to highest", "seeds", "seconds")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row[key] for key in ("name", "task", "base", "features", "data", "measure")]
        numbers = [f"{row['mean']:.4f} ± {row['std']:.4f}", f"{row['min']:.4f} to {row['max']:.4f}"]
        cells += [*numbers, row["seeds"], row["seconds"]]
        lines.append(f"| {' | '.join(printable(str(cell)).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def write_table(found: Sequence[Mapping[str, Any]], folder: str | Path) -> list[dict[str, Any]]:
    """Write `table.md` and `table.json`, a row for each evaluation and split, both or none.

    Args:
        found: Of each evaluation what `evaluate_recipe` gave.
        folder: Where to.

    Returns:
        The rows.
    """
    rows = table_rows(found)
    atomic_files(folder, {f"{TABLE}.md": table_text(rows), f"{TABLE}.json": json.dumps(rows, indent=2) + "\n"})
    return rows


__all__ = ["METRICS", "TABLE", "spread", "summary", "table_rows", "table_text", "write_report", "write_table"]
