"""`diffusers-repr evaluate RECIPE.yaml ...`: fit and measure what recipes tell, with pictures, cards and one table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

OUT = options.Out("evaluation", ("recipe.yaml", "table.json", "*/recipe.yaml"), again="resumed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("recipes",)

    recipes: list[str] = setting(REQUIRED, "YAML files, each with task, base, source, fit, data, measure and seeds")
    out: str = setting(REQUIRED, "folder for metrics.json, README.md and seed-N/; of several recipes one folder each")
    seeds: list[int] | None = setting(None, "in place of those of the recipes")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    quiet: bool = setting(False, "no progress bar")
    json: bool = setting(False, "print JSON instead of a table")
    overwrite: bool = setting(False, "replace evaluations of other recipes in --out")


def run(args: Settings) -> int:
    """Check all, evaluate one after another, write the table and print it."""
    from diffusers_repr.tasks.evaluation.recipe import read_evaluation
    from diffusers_repr.tasks.evaluation.report import table_rows, table_text, write_table
    from diffusers_repr.tasks.evaluation.run import evaluate_recipes

    recipes = [read_evaluation(path, args.seeds) for path in args.recipes]
    stems = [Path(path).stem for path in args.recipes]
    twice = [stem for stem in stems if stems.count(stem) > 1]
    if twice:
        raise ValueError(f"Two recipes are called {twice[0]!r}; each has a folder of its file's name. Rename one.")
    several, out = len(recipes) > 1, Path(args.out)
    folders = [out / stem for stem in stems] if several else [out]
    if several and (out / "recipe.yaml").is_file():
        raise FileExistsError(
            f"--out {args.out!r} holds the evaluation of one recipe; name another folder for several."
        )
    bar = options.bar(args.quiet, "evaluate", "image")

    def tell(text: str) -> None:
        options.say(text, aside=args.json)

    found = evaluate_recipes(recipes, folders, options.device(args.device), args.overwrite, bar, tell)
    rows = write_table(found, out) if several else table_rows(found)
    for row in rows if args.json else ():
        print(json.dumps(row))
    if not args.json:
        print(table_text(rows), end="")
    options.say(f"Saved to {args.out}", aside=args.json)
    return 0
