"""`progress_bar`: the one kind of bar of the library: a moving one on a terminal, one line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any, Self


def progress_bar(
    total: float, what: str | None = None, unit: str = "it", *, start: float = 0, shown: bool = True
) -> Any:
    """A bar of tqdm; where the output is no terminal and no notebook, one line at its end, so that logs stay short.

    Both have `update(count)`, `close()`, `set_description(text)`, `set_postfix_str(text, refresh=False)`, `refresh()`,
    the attributes `n` and `total`, and are context managers.

    Args:
        total: How much there is to do.
        what: What is being done.
        unit: Of what is counted.
        start: How much is done already.
        shown: False: nothing is shown.
    """
    from tqdm.asyncio import tqdm_asyncio
    from tqdm.auto import tqdm

    # tqdm.auto's class is another one where it draws in a notebook, whose output is no terminal either.
    if not shown or sys.stderr.isatty() or tqdm is not tqdm_asyncio:
        return tqdm(total=total, desc=what, unit=unit, initial=start, disable=not shown, mininterval=0.5)
    return LineBar(total, what, unit, start)


class LineBar:
    """Counts, and tells in one line when it is closed; for files and pipes.

    Args:
        total: As `progress_bar`.
        what: As `progress_bar`.
        unit: As `progress_bar`.
        start: As `progress_bar`.

    Example:
        >>> bar = LineBar(3, "features", "image")
        >>> for _ in range(3):
        ...     _ = bar.update()
        >>> bar.line().startswith("features: 3/3 [00:00")
        True
    """

    def __init__(self, total: float, what: str | None = None, unit: str = "it", start: float = 0) -> None:
        self.total, self.n, self.desc, self.unit, self.initial = total, start, what, unit, start
        self.postfix, self._since, self._open = "", time.perf_counter(), True

    def update(self, n: float = 1) -> bool | None:
        """Count."""
        self.n += n
        return None

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """What is being done."""
        self.desc = desc

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """What stands at the end of the line."""
        self.postfix = s

    def refresh(self) -> None:
        """Nothing is drawn on the way."""

    def line(self) -> str:
        """The line."""
        from tqdm.std import tqdm

        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate = (self.n - self.initial) / seconds
        per = f"{rate:.3g} {self.unit}/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s/{self.unit}"
        parts = [tqdm.format_interval(seconds), per, *([self.postfix] if self.postfix else [])]
        return f"{f'{self.desc}: ' if self.desc else ''}{self.n:g}/{self.total:g} [{', '.join(parts)}]"

    def close(self) -> None:
        """Tell the line, once."""
        if self._open:
            self._open = False
            print(self.line(), file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


__all__ = ["LineBar", "progress_bar"]
