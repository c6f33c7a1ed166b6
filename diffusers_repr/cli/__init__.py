"""The command `diffusers-repr`: one file a command, imported when it is called."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Sequence
from typing import Any

import diffusers_repr
from diffusers_repr.cli import options, words
from diffusers_repr.cli.guard import EXIT_CODES, HELP, guarded, plain_warnings, split_flags
from diffusers_repr.cli.library_output import bars, quiet_logs

# Command -> one line of help. Each lives in cli/<command>.py, `_` between two words, with a dataclass `Settings` and
# `run(settings) -> int`.
COMMANDS = {
    "layers": "print the layers of a model that can be read",
    "extract": "write features of a data set to a folder",
    "cache": "encode a data set once for training: VAE moments, features of teachers",
    "assign": "write what a model is to be conditioned on: clusters, neighbours, vectors, classes of few labels",
    "select": "find the noise level and layers that suit a task",
    "compare": "fit all heads on one model under one protocol, and say which to take",
    "probe": "fit a probe on features and save it",
    "predict": "label images with a saved probe",
    "classify": "name what is on images, without training",
    "match": "find points of one image in another",
    "segment fit": "learn the classes of pixels from a few images with masks",
    "segment predict": "write masks of images by a saved segmenter",
    "segment open": "write segments of images under any names, by a saved open-vocabulary segmenter",
    "evaluate": "fit and measure what recipes tell: numbers, pictures, cards and one table",
    "generate": "make images of classes or prompts, or variants of images, as data to train on",
    "align": "compare the layers of a model with an encoder, level by level",
    "convert": "turn a checkpoint of SiT, DiT, REPA, REG, HybViT, MoCo v3 or a readout head into a folder that loads",
    "publish": "push all pipelines, schedulers, models and heads to the Hub",
    "push": "push a task, a feature store, a pipeline or a model to the Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: whatever goes wrong is one line on stderr and an exit code of `EXIT_CODES`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    named = [name for count in (2, 1) if (name := " ".join(argv[:count])) in COMMANDS]
    command = named[0] if named else _overview().parse_args(argv).command
    program, (flags, debug, verbose) = f"diffusers-repr {command}", split_flags(argv[len(command.split()) :])
    with plain_warnings(program), quiet_logs(verbose):
        return guarded(program, lambda: _run(command, flags), debug)


def _overview() -> argparse.ArgumentParser:
    """The parser of what stands before a command: `--help`, `--version`, or what is no command."""
    parser = argparse.ArgumentParser("diffusers-repr", description="Representations of diffusion models.", **HELP)
    parser.add_argument("--version", action="version", version=f"diffusers-repr {diffusers_repr.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        subparsers.add_parser(name, help=text)
    return parser


def command_module(command: str) -> Any:
    """The module of a command of `COMMANDS`."""
    return importlib.import_module(f"diffusers_repr.cli.{command.replace(' ', '_')}")


def read_settings(command: str, argv: Sequence[str]) -> Any:
    """The `Settings` of a command from its flags and its recipe.

    Raises:
        FileNotFoundError, ValueError, ImportError: As `parse_recipe`.
    """
    from diffusers_repr.config.recipe import parse_recipe

    kind = command_module(command).Settings
    options = {"prog": f"diffusers-repr {command}", "usage": _usage(kind), **HELP}
    return parse_recipe([kind], argv, COMMANDS[command], **options)[0]


def _usage(kind: type) -> str:
    """One line: what has no flag, and what must be given; all flags would fill a screen before the error."""
    positional = getattr(kind, "POSITIONAL", ())
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in positional
    ]
    words = [*map(str.upper, positional), *(f"--{name} {name.upper()}" for name in needed)]
    return " ".join(["%(prog)s", *words, "[--config RECIPE.yaml] [--SETTING VALUE ...] [--help]"])


def _run(command: str, argv: Sequence[str]) -> int:
    """Read the settings, check the device and the folder to write to, then work."""
    settings = read_settings(command, argv)
    module = command_module(command)
    with words.in_words_of(settings), bars(not getattr(settings, "quiet", False)):
        code = _work(module, settings)
    sys.stdout.flush()
    return code


def _work(module: Any, settings: Any) -> int:
    if hasattr(settings, "out"):
        options.check_out(settings.out, module.OUT, settings.overwrite)
        if module.OUT.again == "same" and not settings.overwrite:
            importlib.import_module("diffusers_repr.cli.recorded").refuse_other_recipe(settings, module.OUT)
    options.check_limit(getattr(settings, "limit", None))
    if getattr(settings, "device", None) is not None:
        options.check_device(settings.device)
    return module.run(settings)


__all__ = ["COMMANDS", "EXIT_CODES", "command_module", "main", "read_settings"]
