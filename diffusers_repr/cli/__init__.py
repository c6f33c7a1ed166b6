"""The command `diffusers-repr`: one file a command, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Command -> one line of help. Each lives in cli/<command>.py with `arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    "layers": "print the layers of a model that can be read",
    "extract": "write features of a data set to a folder",
    "select": "find the noise level and layers that suit a task",
    "probe": "fit a probe on features and save it",
    "predict": "label images with a saved probe",
    "push": "push a probe, a feature store or a pipeline to the Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; a user's mistake prints one line and returns 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("diffusers-repr", description="Representations of diffusion models.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if name == chosen:
            importlib.import_module(f"diffusers_repr.cli.{name}").arguments(sub)
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(f"diffusers_repr.cli.{args.command}").run(args)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if getattr(args, "traceback", False):
            raise
        print(f"diffusers-repr {args.command}: {error}", file=sys.stderr)
        return 2
