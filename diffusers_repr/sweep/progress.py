"""`SweepBar`: the forwards of all stages of a sweep, counted once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

from diffusers_repr.store.processes import process_state
from diffusers_repr.store.progress import progress_bar

Progress = bool | Callable[[float], None]


class SweepBar:
    """How far a sweep is.

    How many forwards the later stages make is known when they begin. Until then each counts with the most that it may
    make, so that the total only shrinks, and the share that is done only grows.

    Args:
        progress: Show a bar on the main process, or call this with the share that is done, in [0, 1].
        what: What the bar says before the first stage.
    """

    def __init__(self, progress: Progress, what: str) -> None:
        shown = progress is True and process_state().is_main_process
        self.tell = progress if callable(progress) else None
        self.bar: Any = progress_bar(0, what, "forward", shown=shown)
        self.what, self.done, self._most, self._planned = what, 0, {"": 0}, {"": 0}

    def plan(self, most: Mapping[str, int]) -> None:
        """Announce the stages: what their names begin with -> most forwards of this process."""
        self._most |= most
        self._planned |= dict.fromkeys(most, 0)
        self._refresh()

    def begin(self, stage: str, forwards: int) -> None:
        """Begin a stage, or a part of one, of so many forwards; stages planned before it make no more."""
        names = list(self._most)
        now = next((name for name in names if name and stage.startswith(name)), "")
        for name in names[: names.index(now)]:
            self._most[name] = self._planned[name]
        self._planned[now] += forwards
        self._most[now] = max(self._most[now], self._planned[now])
        self.bar.set_description(stage, refresh=False)
        self._refresh()

    def update(self, forwards: int = 1) -> None:
        """Count forwards."""
        self.done += forwards
        self.bar.update(forwards)
        if self.tell is not None:
            self.tell(min(self.done / max(self.total, 1), 1.0))

    @property
    def total(self) -> int:
        """Most forwards of all stages, as far as it is known now."""
        return sum(self._most.values())

    def _refresh(self) -> None:
        self.bar.total = self.total
        self.bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *raised: object) -> None:
        if kind is None:
            self._most = {"": self.done}
            self.bar.set_description(self.what, refresh=False)
            self._refresh()
            if self.tell is not None:
                self.tell(1.0)
        self.bar.close()


__all__ = ["Progress", "SweepBar"]
