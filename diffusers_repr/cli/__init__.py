"""The command `diffusers-repr`: one file a command, imported when it is called."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import select as waiting  # `select` here is one of the commands
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers_repr
from diffusers_repr.cli import options, words

# Command -> one line of help. Each lives in cli/<command>.py with a dataclass `Settings` and `run(settings) -> int`.
COMMANDS = {
    "layers": "print the layers of a model that can be read",
    "extract": "write features of a data set to a folder",
    "cache": "encode a data set once for training: VAE moments, features of teachers",
    "select": "find the noise level and layers that suit a task",
    "probe": "fit a probe on features and save it",
    "predict": "label images with a saved probe",
    "align": "compare the layers of a model with an encoder, level by level",
    "convert": "turn a checkpoint of SiT, DiT, REPA, REG, HybViT or MoCo v3 into a folder that loads",
    "publish": "push all pipelines, schedulers, models and heads to the Hub",
    "push": "push a probe, a feature store, a pipeline or a model to the Hub",
}


EXIT_CODES = """exit codes:
  0    done (also when the reader of the output, as `head`, has seen enough)
  1    not finished: no memory, a full disk, a part of a publish that failed, or an error that was not foreseen
  2    wrong use or input: arguments, files, models, data or a Hub that do not exist or do not fit
  130  interrupted (Ctrl-C)"""
_EPILOG = f"{EXIT_CODES}\n\n--debug prints where an error arose, before its line."


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Exit codes in lines as they are, and every default."""


_HELP: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": _HelpFormatter}
_FORESEEN = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: whatever goes wrong is one line on stderr and an exit code of `EXIT_CODES`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv[0] if argv and argv[0] in COMMANDS else _overview().parse_args(argv).command
    debug = "--debug" in argv
    with _plain_warnings(command):
        return _guarded(command, debug, lambda: _run(command, [word for word in argv[1:] if word != "--debug"]))


def _overview() -> argparse.ArgumentParser:
    """The parser of what stands before a command: `--help`, `--version`, or what is no command."""
    parser = argparse.ArgumentParser("diffusers-repr", description="Representations of diffusion models.", **_HELP)
    parser.add_argument("--version", action="version", version=f"diffusers-repr {diffusers_repr.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        subparsers.add_parser(name, help=text)
    return parser


def read_settings(command: str, argv: Sequence[str]) -> Any:
    """The `Settings` of a command from its flags and its recipe.

    Raises:
        FileNotFoundError, ValueError, ImportError: As `parse_recipe`.
    """
    from diffusers_repr.config.recipe import parse_recipe

    kind = importlib.import_module(f"diffusers_repr.cli.{command}").Settings
    return parse_recipe([kind], argv, COMMANDS[command], prog=f"diffusers-repr {command}", **_HELP)[0]


def _run(command: str, argv: Sequence[str]) -> int:
    """Read the settings, check the device and the folder to write to, then work."""
    settings = read_settings(command, argv)
    module: Any = importlib.import_module(f"diffusers_repr.cli.{command}")
    with words.in_words_of(settings):
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


def _guarded(command: str, debug: bool, work: Callable[[], int | None]) -> int:
    """The exit code of some work, whatever it raises."""
    try:
        return work() or 0
    except SystemExit:
        raise
    except BrokenPipeError as error:  # the reader has seen enough, as in `... | head`
        if _reader_is_gone():
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
            )  # else Python flushes, and fails, at its end
            return 0
        return _tell(command, error, debug)
    except BaseException as error:  # also what libraries in other languages raise for a panic
        return _tell(command, error, debug)


def _tell(command: str, error: BaseException, debug: bool) -> int:
    """Print one line of an error, and all of it if asked to; its exit code."""
    if debug:
        traceback.print_exception(error)
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    name = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    elif _out_of_memory(error):
        text = f": {text}" if text else ""
        code, text = (
            1,
            f"out of memory{text}. Try a smaller --batch_size or --dtype bfloat16, where the command has it.",
        )
    elif isinstance(error, OSError) and error.errno in _NO_ROOM:
        code = 1
    elif isinstance(error, _FORESEEN) and not isinstance(error, RecursionError):
        code, text = 2, text or name
    else:
        code, text = 1, f"not foreseen: {name}: {text}. Please report it; --debug shows where it arose."
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(f"diffusers-repr {command}: {text}", file=sys.stderr)
    return code


def _out_of_memory(error: BaseException) -> bool:
    """Of Python, of an accelerator, or of torch on the CPU; torch is not imported for it."""
    names = {cls.__name__ for cls in type(error).__mro__}
    message = str(error).lower()
    return bool(names & {"MemoryError", "OutOfMemoryError", "ArrowMemoryError"}) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in message or "out of memory" in message)
    )


def _reader_is_gone() -> bool:
    """Whether it is our output that nobody reads; a connection elsewhere breaks with the same error."""
    try:
        watch = waiting.poll()
        watch.register(sys.stdout.fileno(), 0)
        return bool(watch.poll(0))
    except (AttributeError, OSError, ValueError):  # a system without poll; an output that is no file
        return True


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
