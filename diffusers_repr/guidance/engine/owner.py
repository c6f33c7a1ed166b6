"""`Owner`: which calls of a network are guided, where several pipelines and threads share it."""

from __future__ import annotations

import sys
import threading
from typing import Any

from torch import nn

from diffusers_repr.denoiser.hooks import Turn
from diffusers_repr.guidance.engine.callers import calling_pipeline


class Owner:
    """Whose calls of a network a guidance acts in: the guided pipeline's, in any thread; in its own thread, all.

    Its own thread is the one that called `guide` or entered the block. One run at a time is guided.

    Args:
        model: The network.
        pipe: The pipeline that is guided; None for a loop of the user's.
    """

    def __init__(self, model: nn.Module, pipe: Any) -> None:
        self._model, self._pipe = model, pipe
        self._home, self._turn = Turn(taken=True), Turn()
        self._running_in: int | None = None  # the thread that made the newest guided call

    def settle(self) -> None:
        """The running thread is its own from now on."""
        self._home.take()

    def enters(self) -> bool:
        """Whether the call under way is to be guided.

        Raises:
            RuntimeError: If it is, and a guided run is under way in another thread.
        """
        if not self._home() and (self._pipe is None or calling_pipeline(self._model) is not self._pipe):
            return False
        if not self._turn():
            if self.is_busy_elsewhere():
                raise RuntimeError(self._two_threads())
            self._turn.take()
            self._running_in = threading.get_ident()
        return True

    def is_in(self) -> bool:
        """Whether the newest guided call was made by the running thread."""
        return self._turn()

    def is_busy_elsewhere(self) -> bool:
        """Whether a guided run is under way in another thread: its stack holds the pipeline's call, or the network's.

        What is asked is the stack and not a mark, which an interrupt would leave behind.
        """
        running = self._running_in
        # If it is the running thread's own number, it was given out again: its holder has ended.
        if running is None or running == threading.get_ident() or self._turn():
            return False
        # Private ground: torch and diffusers mark no call as under way. If one of the two methods were renamed, a run
        # in another thread would pass for ended, and its guidance could be removed from under it.
        frame = sys._current_frames().get(running)
        while frame is not None:
            if frame.f_code.co_name in ("__call__", "_call_impl"):
                caller = frame.f_locals.get("self")
                if caller is not None and (caller is self._pipe or caller is self._model):
                    return True
            frame = frame.f_back
        return False

    def _two_threads(self) -> str:
        name = type(self._model if self._pipe is None else self._pipe).__name__
        return (
            f"This guided {name} is running in another thread. A pipeline steps one scheduler, and a guidance follows "
            "one run: give each thread a pipeline with a scheduler of its own, and a network of its own if both are "
            "to be guided (copy.deepcopy)."
        )


__all__ = ["Owner"]
