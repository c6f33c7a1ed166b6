"""Heads under the names of modules in which they lay, so that pipeline folders saved then load."""

from __future__ import annotations

import importlib
import sys

from diffusers_repr.hub.components import MOVED_MODULES


def keep_moved_names() -> None:
    """Let the modules of heads be found by their former names too.

    A `model_index.json` names the module of a component that is not of diffusers, and diffusers looks it up among the
    modules that are imported: nothing is imported because a file names it, and no other name is found than before.
    """
    for former, present in MOVED_MODULES.items():
        sys.modules.setdefault(former, importlib.import_module(present))


__all__ = ["keep_moved_names"]
