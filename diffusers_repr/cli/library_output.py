"""What other libraries print into the output of a command: their bars, and the lines of their logs."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Library -> its own setting, which is obeyed where it is set.
_LOGS = {"diffusers": "DIFFUSERS_VERBOSITY", "transformers": "TRANSFORMERS_VERBOSITY"}


@contextmanager
def quiet_logs(verbose: bool) -> Iterator[None]:
    """Inside, diffusers and transformers log errors alone; as they were after it.

    Neither is imported for it: one that is imported inside takes the level from its environment variable.

    Args:
        verbose: Leave all as it is. So does the variable of a library, for that library.
    """
    quieted = [] if verbose else [name for name, variable in _LOGS.items() if variable not in os.environ]
    were = {name: logging.getLogger(name).level for name in quieted}
    for name in quieted:
        os.environ[_LOGS[name]] = "error"
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in were.items():
            os.environ.pop(_LOGS[name], None)
            logging.getLogger(name).setLevel(level or logging.WARNING)  # that of both, where it was not imported yet


@contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Inside, `--quiet` holds for the bars of other libraries too; they have none where stderr is no terminal.

    Args:
        shown: Without `--quiet`.
    """
    if shown and sys.stderr.isatty():
        yield
        return
    import datasets
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown_by = [part for part in (of_diffusers, of_transformers) if part.is_progress_bar_enabled()]
    of_datasets = not datasets.are_progress_bars_disabled()
    for part in shown_by:
        part.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for part in shown_by:
            part.enable_progress_bar()
        if of_datasets:
            datasets.enable_progress_bars()
