"""The parts of a data set that `select` and `probe` work on: its own splits, or parts held out of the only one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers_repr.cli.options import say

if TYPE_CHECKING:
    from diffusers_repr.data.image_data import ImageData


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
