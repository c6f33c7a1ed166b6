"""Whatever goes wrong is one line on stderr and an exit code: of the commands, and of the scripts in `examples/`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import select as waiting
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from diffusers_repr.cli.library_output import bars, quiet_logs

EXIT_CODES = """exit codes:
  0    done (also when the reader of the output, as `head`, has seen enough)
  1    not finished: no memory, a full disk, a part of a publish that failed, or an error that was not foreseen
  2    wrong use or input: arguments, files, models, data or a Hub that do not exist or do not fit
  130  interrupted (Ctrl-C)"""
_EPILOG = f"""{EXIT_CODES}

--debug prints where an error arose, before its line; --verbose shows the log lines of diffusers and transformers, as
DIFFUSERS_VERBOSITY and TRANSFORMERS_VERBOSITY do."""


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Exit codes in lines as they are, and every default; a flag without one says in words what holds then."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None:
            return f"{action.help} (required)" if action.required and action.option_strings else action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})" if action.default else action.help
        return super()._get_help_string(action)


# Options of an `argparse.ArgumentParser`: those of a command, and those of a script, whose usage would fill a screen.
HELP: dict[str, Any] = {"epilog": _EPILOG, "formatter_class": _HelpFormatter}
SCRIPT_HELP: dict[str, Any] = {**HELP, "usage": "%(prog)s [--config RECIPE.yaml] [--SETTING VALUE ...] [--help]"}

FORESEEN = (ValueError, TypeError, OSError, ImportError, RuntimeError, FloatingPointError)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_SMALLER = "a smaller --batch_size or --dtype bfloat16, where the command has it"
_SMALLER_TRAINING = "a smaller --train_batch_size, --gradient_checkpointing, or --mixed_precision bf16"


def run_script(main: Callable[[list[str]], object], smaller: str = _SMALLER_TRAINING) -> NoReturn:
    """Run a script's `main` on the command line, and exit with a code of `EXIT_CODES`.

    Args:
        main: Called with the flags; `--debug`, which prints the traceback of an error before its line, and `--verbose`
            are left out.
        smaller: What to try where memory is short.
    """
    program, (flags, debug, verbose) = Path(sys.argv[0]).name, split_flags(sys.argv[1:])

    def work() -> int:
        with bars(shown=True):
            main(flags)
        sys.stdout.flush()
        return 0

    with plain_warnings(program), quiet_logs(verbose):
        sys.exit(guarded(program, work, debug, smaller))


def split_flags(argv: Sequence[str]) -> tuple[list[str], bool, bool]:
    """The flags without those that all commands and scripts have; whether `--debug` and `--verbose` were there."""
    return [word for word in argv if word not in ("--debug", "--verbose")], "--debug" in argv, "--verbose" in argv


def guarded(program: str, work: Callable[[], int | None], debug: bool = False, smaller: str = _SMALLER) -> int:
    """The exit code of some work, whatever it raises; an error is told in one line on stderr.

    Args:
        program: What the line begins with.
        work: Gives the exit code, None for 0.
        debug: Print the traceback first.
        smaller: What to try where memory is short.
    """
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
        return _tell(program, error, debug, smaller)
    except BaseException as error:  # also what libraries in other languages raise for a panic
        return _tell(program, error, debug, smaller)


def _tell(program: str, error: BaseException, debug: bool, smaller: str) -> int:
    """Print one line of an error, and all of it if asked to; its exit code."""
    if debug:
        traceback.print_exception(error)
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    name = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        code, text = 130, "interrupted"
    elif _out_of_memory(error):
        text = f": {text}" if text else ""
        code, text = 1, f"out of memory{text}. Try {smaller}."
    elif isinstance(error, OSError) and error.errno in _NO_ROOM:
        code = 1
    elif isinstance(error, FORESEEN) and not isinstance(error, RecursionError):
        code, text = 2, text or name
    else:
        code, text = 1, f"not foreseen: {name}: {text}. Please report it; --debug shows where it arose."
    with contextlib.suppress(OSError, ValueError):  # stderr is closed
        print(f"{program}: {text}", file=sys.stderr)
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
def plain_warnings(program: str) -> Iterator[None]:
    """Inside, what we warn of is one line without a line of our code."""
    usual = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: object, **more: object) -> str:
        if category is UserWarning:
            return f"{program}: warning: {message}\n"
        return usual(message, category, *where, **more)  # type: ignore[arg-type]

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = usual
