"""The command `diffusers-repr`: one file a command, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import diffusers_repr

# Command -> one line of help. Each lives in cli/<command>.py with `arguments(parser)` and `run(args) -> int`.
COMMANDS = {
    "layers": "print the layers of a model that can be read",
    "extract": "write features of a data set to a folder",
    "select": "find the noise level and layers that suit a task",
    "probe": "fit a probe on features and save it",
    "predict": "label images with a saved probe",
    "align": "compare the layers of a model with an encoder, level by level",
    "convert": "turn a REPA, SiT or DiT checkpoint into a diffusers folder",
    "publish": "push all pipelines, schedulers, models and heads to the Hub",
    "push": "push a probe, a feature store or a pipeline to the Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; a user's mistake prints one line and returns 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser("diffusers-repr", description="Representations of diffusion models.")
    parser.add_argument("--version", action="version", version=f"diffusers-repr {diffusers_repr.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = argv[0] if argv and argv[0] in COMMANDS else None
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text)
        if name == chosen:
            importlib.import_module(f"diffusers_repr.cli.{name}").arguments(sub)
            sub.add_argument("--traceback", action="store_true", help="of an error, show where it arose")
    args = parser.parse_args(argv)
    with _plain_warnings(args.command):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    try:
        code = importlib.import_module(f"diffusers_repr.cli.{args.command}").run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python flushes, and fails, at its end
        return 0
    except KeyboardInterrupt:
        print(f"diffusers-repr {args.command}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if args.traceback:
            raise
        print(f"diffusers-repr {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code


@contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Inside, what we warn of is one line without a line of our code."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: object, **more: object) -> str:
        if category is UserWarning:
            return f"diffusers-repr {command}: warning: {message}\n"
        return usual(message, category, *where, **more)  # type: ignore[arg-type]

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual
