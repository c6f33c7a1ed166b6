"""The parts of a data set that `select` and `probe` work on: its own splits, or parts held out of the only one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_repr.cli.options import say
from diffusers_repr.cli.recorded import RECIPE
from diffusers_repr.config.recipe import read_recipe

if TYPE_CHECKING:
    from diffusers_repr.data.image_data import ImageData
    from diffusers_repr.sweep.selection import Selection


def open_parts(args: Any, *, measured: bool, validate: float | None = None) -> dict[str, ImageData]:
    """Open `train`, and `validation` and `test` where there are such splits; hold parts out where there are none.

    Of a data set that is one split, `--test_fraction` is held out to test on, drawn by `--split_seed`: the same images
    in both commands, so that what `select` has chosen by is never what the probe is measured on.

    Args:
        args: `Settings` of the command.
        measured: Whether `test` is wanted; else it is left alone.
        validate: Part of train to score on, where there is no validation split; None: none is needed.

    Raises:
        FileNotFoundError, ValueError: As `load_images` and `hold_out`; for a fraction that is none.
    """
    from diffusers_repr.sweep.splits import draw_rows

    if not 0 <= args.test_fraction < 1:
        raise ValueError(f"--test_fraction lies between 0 and 1, 0 included; got {args.test_fraction:g}.")
    if validate is not None and not 0 < validate < 1:
        raise ValueError(f"--validation_fraction lies between 0 and 1; got {validate:g}.")
    parts = {"train": _open(args, args.train_split)}
    tested = getattr(args, "test_split", None) or ("test" if _there(args, "test") else None)
    validation = args.validation_split or ("validation" if _there(args, "validation") else None)
    if validation is not None:
        parts["validation"] = _open(args, validation)
    if tested is not None and measured:
        parts["test"] = _open(args, tested)
    if tested is None and validation is None and args.test_fraction:
        use = "to measure on" if measured else "for the probe to be measured on"
        test = _hold_out(args, parts, args.test_fraction, f"{args.dataset} has one split", use, "test_fraction")
        parts |= {"test": test} if measured else {}
    if args.limit is not None:  # of what is left: what is held out does not depend on it
        parts = {role: draw_rows(data, args.limit, args.split_seed) for role, data in parts.items()}
    if validation is None and validate is not None:
        parts["validation"] = _hold_out(
            args, parts, validate, "No split 'validation'", "to score on", "validation_fraction"
        )
    return parts


def as_selected(args: Any) -> Any:
    """Settings of `probe` with the validation split that `select` was given for the same data, where it has none.

    Args:
        args: `Settings` of the command; `--selection` may lack a recipe, as one that Python saved does.
    """
    recipe = Path(args.selection or "") / RECIPE
    if args.selection is None or args.validation_split is not None or not recipe.is_file():
        return args
    made = read_recipe(recipe)
    split = made.get("validation_split")
    if split is None or not _same_place(str(made.get("dataset")), args.dataset):
        return args
    say(f"validation split: {split}, as that of the selection", args.json)
    return dataclasses.replace(args, validation_split=str(split))


def refuse_seen(selection: Selection, parts: dict[str, ImageData]) -> None:
    """Raise ValueError if the probe would be measured on images that took part in the selection.

    Told by the names of splits, which say what was held out.

    Args:
        selection: That the probe takes its layers from.
        parts: Of `open_parts`.
    """
    test = parts.get("test")
    if test is None:
        return
    held = re.match(r"(.+?), (\S+ held out by seed -?\d+)", test.split)
    whole = test.split if held is None else held[1]
    rest = None if held is None else f"{held[1]} without {held[2]}"
    for role in ("train", "validation"):
        used = selection.recipe.get(role)
        name = str(used.get("name")) if isinstance(used, dict) else ""
        split = name.removeprefix(f"{test.name} (").removesuffix(")")
        of_whole = split != name and re.match(rf"{re.escape(whole)}($| without |, )", split)
        if of_whole and not (rest and re.match(rf"{re.escape(rest)}($| without |, )", split)):
            raise ValueError(
                f"The probe would be measured on {test.name} ({test.split}), of which `select` has seen images "
                f"({role}: {name}): the score would be too good. Give this command the --validation_split, "
                "--test_fraction and --split_seed of `select`, or a --test_split of other images; --test_fraction 0 "
                "measures nothing."
            )


def _same_place(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def _hold_out(args: Any, parts: dict[str, ImageData], fraction: float, why: str, use: str, flag: str) -> ImageData:
    """Take a part out of `train`, and say so."""
    from diffusers_repr.sweep.splits import hold_out

    count = len(parts["train"])
    try:
        parts["train"], held = hold_out(parts["train"], fraction, args.split_seed)
    except ValueError as error:
        raise ValueError(f"{why}; {error} Set --{flag}; --test_fraction 0 leaves all images to the fit.") from error
    say(f"{why}: held out {len(held)} of {count} images {use} (--{flag} {fraction:g}).", args.json)
    return held


def _open(args: Any, split: str) -> ImageData:
    from diffusers_repr.data.image_data import load_images

    return load_images(args.dataset, split, args.image_column, args.label_column)


def _there(args: Any, split: str) -> bool:
    from diffusers_repr.data.splits import has_split

    return has_split(args.dataset, split)
