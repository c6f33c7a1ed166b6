"""Options that several commands share."""

from __future__ import annotations

import argparse


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Declare `--image_size`."""
    parser.add_argument("--image_size", type=int, nargs="+", help="pixels: one side, or height and width")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Declare how labelled images are found, conditioned on and resized."""
    parser.add_argument("--image_column", help="found by type if not given")
    parser.add_argument("--label_column", help="class ids; found by type if not given")
    parser.add_argument("--prompt", help="one for all images")
    parser.add_argument("--class_label", type=int, help="condition of a class-conditional model, one for all images")
    add_image_size(parser)


def image_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """(H, W) as given; None if not.

    Raises:
        ValueError: For more than two numbers.
    """
    given = args.image_size
    if given is None:
        return None
    if len(given) > 2:
        raise ValueError(f"--image_size takes one side, or height and width; got {len(given)} numbers.")
    return given[0], given[-1]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare `--device`."""
    parser.add_argument("--device", help="cuda, cpu, ...; an accelerator if there is one")


def device(args: argparse.Namespace) -> str:
    """The device as given; the accelerator of this machine, or the CPU, if not."""
    import torch

    if args.device is not None:
        return args.device
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
