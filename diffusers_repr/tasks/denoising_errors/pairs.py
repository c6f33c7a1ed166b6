"""Errors of (image, prompt, level, draw): where they come from, and those that were seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Asked:
    """Pairs to evaluate, one a place of four columns `(n,)`.

    Attributes:
        images: Places of images.
        prompts: Places of prompts, or of classes.
        timesteps: Levels, float64.
        draws: Which draw of noise at the level.
    """

    images: Tensor
    prompts: Tensor
    timesteps: Tensor
    draws: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Tensor | slice) -> Asked:
        """Some of them."""
        return Asked(self.images[rows], self.prompts[rows], self.timesteps[rows], self.draws[rows])


class PairErrors(Protocol):
    """Gives the errors of pairs: a network, or a table of what was evaluated before."""

    def __call__(self, asked: Asked) -> Tensor:
        """`(n,)` float64 on the CPU."""
        ...


def ask(live: Tensor, timesteps: Sequence[float], draw: int = 0) -> Asked:
    """All live prompts of each image at these levels; of one image and level all prompts stand together.

    Args:
        live: `(N, P)` bool.
        timesteps: Levels.
        draw: Of the noise.
    """
    images, prompts = live.nonzero(as_tuple=True)
    counts = live.sum(1)
    starts = torch.cumsum(counts, 0) - counts
    rows = [
        torch.arange(int(start), int(start + count)).repeat(len(timesteps))
        for start, count in zip(starts, counts, strict=True)
        if count
    ]
    times = [torch.tensor(timesteps, dtype=torch.float64).repeat_interleave(int(count)) for count in counts if count]
    if not rows:
        empty = torch.zeros(0, dtype=torch.long)
        return Asked(empty, empty, empty.double(), empty)
    where = torch.cat(rows)
    return Asked(images[where], prompts[where], torch.cat(times), torch.full((len(where),), draw))


@dataclass
class PairTable:
    """A table of errors that is filled when asked, and asks nothing twice.

    Attributes:
        source: What is asked; None: only what is held can be had.
        images: Number of images.
        prompts: Number of prompts.
        held: (timestep, draw) -> errors `(N, P)` float64, NaN where none was asked for.
        evaluations: How many the source was asked for.
    """

    source: PairErrors | None
    images: int
    prompts: int
    held: dict[tuple[float, int], Tensor] = field(default_factory=dict)
    evaluations: int = 0

    def __call__(self, asked: Asked) -> Tensor:
        """As `PairErrors`.

        Raises:
            KeyError: For pairs that are not held, without a source.
        """
        keys = list(zip(asked.timesteps.tolist(), asked.draws.tolist(), strict=True))
        found = torch.full((len(asked),), torch.nan, dtype=torch.float64)
        places: dict[tuple[float, int], list[int]] = {}
        for at, key in enumerate(keys):
            places.setdefault(key, []).append(at)
        for key, rows in places.items():
            if key in self.held:
                found[rows] = self.held[key][asked.images[rows], asked.prompts[rows]]
        missing = found.isnan().nonzero()[:, 0]
        if not len(missing):
            return found
        if self.source is None:
            raise KeyError(f"{len(missing)} of {len(asked)} pairs are not in the table, and it has no source.")
        fresh = self.source(asked.take(missing))
        self.evaluations += len(missing)
        found[missing] = fresh
        for key, rows in places.items():
            table = self.held.setdefault(key, torch.full((self.images, self.prompts), torch.nan, dtype=torch.float64))
            table[asked.images[rows], asked.prompts[rows]] = found[rows]
        return found


__all__ = ["Asked", "PairErrors", "PairTable", "ask"]
