"""What a comparison of heads found: a table, a picture, and which head to take."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers_repr.hub import atomic_write
from diffusers_repr.pictures.figure import png_of, require_matplotlib


@dataclass(frozen=True)
class HeadScore:
    """Test accuracies of one head with a share of the labels.

    Attributes:
        name: Of the head, or of the baseline: `pixels`, `random`.
        share: Of the training labels, 0 to 1.
        rows: Training images.
        accuracies: On the test images, of each seed: which labels, noise, first weights and order.
        forwards: Of the network an image, to predict; 0 of pixels.
        parameters: Fitted numbers; of neighbours the bank.
        seconds: To fit, mean over seeds, features read before; those of a head that needs the network in every step
            are with it.
        baseline: Whether it is there to compare with.
    """

    name: str
    share: float
    rows: int
    accuracies: tuple[float, ...]
    forwards: float
    parameters: int
    seconds: float
    baseline: bool = False

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Over seeds (n - 1); 0 with one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f}"


@dataclass(frozen=True)
class Choice:
    """Which head to take with a share of the labels.

    Attributes:
        share: Of the labels.
        take: Name of the head.
        best: Name of the head with the highest mean.
        why: In words.
    """

    share: float
    take: str
    best: str
    why: str


@dataclass(frozen=True, repr=False)
class HeadComparison:
    """The result of `compare_heads`.

    Attributes:
        scores: Every head with every share of the labels.
        recipe: Base, data, places, protocol, seeds.
        skipped: Head that could not take part -> why.
    """

    scores: tuple[HeadScore, ...]
    recipe: Mapping[str, Any]
    skipped: Mapping[str, str]

    @property
    def shares(self) -> list[float]:
        """Of the labels, ascending."""
        return sorted({score.share for score in self.scores})

    def of(self, share: float) -> list[HeadScore]:
        """The scores with a share of the labels."""
        return [score for score in self.scores if score.share == share]

    def choose(self, share: float | None = None) -> Choice:
        """Which head to take: of those whose mean is within the spread of the best one's, the cheapest.

        Two means are within the spread if they differ by no more than the larger of their standard deviations over
        seeds. Cheaper is what takes fewer forwards of the network to predict, then what has fewer parameters.

        Args:
            share: Of the labels; all if None.
        """
        share = self.shares[-1] if share is None else share
        found = [score for score in self.of(share) if not score.baseline]
        best = max(found, key=lambda score: (score.mean, -score.forwards, -score.parameters))
        near = [score for score in found if _within(score, best)]
        take = min(near, key=lambda score: (round(score.forwards, 6), score.parameters, -score.mean))
        labels = "all labels" if share == 1 else f"{share:.3g} of the labels"
        why = f"With {labels} ({take.rows} images) take `{take.name}`: {take}."
        others = sorted((s for s in found if s is not take), key=lambda score: -score.mean)
        if take is not best:
            why += (
                f" `{best.name}` has the highest mean, {best}, which is within the spread over seeds; it takes "
                f"{_cost(best)} instead of {_cost(take)}."
            )
        elif others:
            beyond = "beyond" if not _within(others[0], take) else "within"
            why += f" The next is `{others[0].name}`, {others[0]}, {beyond} the spread over seeds"
            why += "." if beyond == "beyond" else f", and takes {_cost(others[0])} instead of {_cost(take)}."
        for base in (score for score in self.of(share) if score.baseline):
            if base.mean >= take.mean or _within(base, take):
                why += f" But `{base.name}` reaches {base} without what the model has learned: look for another base."
        return Choice(share, take.name, best.name, why)

    def table(self) -> str:
        """Markdown: a head a row, a share of the labels a column, in percent; then what a head costs."""
        shares, names = self.shares, list(dict.fromkeys(score.name for score in self.scores))
        heads = [f"{share:.0%} of labels ({self.of(share)[0].rows})" for share in shares]
        lines = ["| head | " + " | ".join(heads) + " | forwards | parameters | seconds to fit |"]
        lines.append("|---|" + "---|" * (len(shares) + 3))
        taken = {share: self.choose(share).take for share in shares}
        for name in names:
            found = {score.share: score for score in self.scores if score.name == name}
            cells = []
            for share in shares:
                score = found.get(share)
                text = "" if score is None else f"{100 * score.mean:.1f} ± {100 * score.std:.1f}"
                cells.append(f"**{text}**" if name == taken[share] else text)
            last = found[max(found)]
            kind = f"{name} (baseline)" if last.baseline else name
            cost = f"{last.forwards:.2f} | {last.parameters:,} | {last.seconds:.1f}"
            lines.append(f"| {kind} | " + " | ".join(cells) + f" | {cost} |")
        return "\n".join(lines)

    def words(self) -> str:
        """Which head to take with each share of the labels, a line each; and what could not take part."""
        lines = [f"- {self.choose(share).why}" for share in reversed(self.shares)]
        lines += [f"- `{name}` took no part: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def plot(self) -> Any:
        """A figure of matplotlib: accuracy by share of the labels, a line a head, bars for the standard deviation.

        Raises:
            ImportError: If matplotlib is missing.
        """
        figure = require_matplotlib().Figure(figsize=(7.2, 4.4), layout="constrained", dpi=120)
        axes = figure.add_subplot()
        for name in dict.fromkeys(score.name for score in self.scores):
            found = sorted((s for s in self.scores if s.name == name), key=lambda score: score.share)
            axes.errorbar(
                [score.rows for score in found],
                [100 * score.mean for score in found],
                [100 * score.std for score in found],
                label=name,
                linestyle="--" if found[0].baseline else "-",
                color="0.5" if name == "pixels" else "0.75" if found[0].baseline else None,
                marker="o",
                markersize=4,
                capsize=3,
            )
        axes.set_xscale("log")
        rows = [self.of(share)[0].rows for share in self.shares]
        axes.set_xticks(rows, [f"{row}\n({share:.0%})" for row, share in zip(rows, self.shares, strict=True)])
        axes.minorticks_off()
        axes.set_xlabel("labelled training images")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=8)
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        scores = [{**asdict(score), "mean": score.mean, "std": score.std} for score in self.scores]
        choices = [asdict(self.choose(share)) for share in self.shares]
        return {"choices": choices, "scores": scores, "skipped": dict(self.skipped), "recipe": dict(self.recipe)}

    def save(self, folder: str | Path, plot: bool = True) -> None:
        """Write `comparison.json`, `comparison.md` and `comparison.png` into a folder, which is made if missing.

        Raises:
            ImportError: If matplotlib is missing; the other two files are written before.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        atomic_write(place / "comparison.json", json.dumps(self.to_dict(), indent=2) + "\n")
        atomic_write(place / "comparison.md", f"{self.table()}\n\n{self.words()}\n")
        if plot:
            atomic_write(place / "comparison.png", png_of(self.plot()))

    def __repr__(self) -> str:
        return f"HeadComparison({len(self.scores)} scores; {self.choose().why})"


def _within(one: HeadScore, other: HeadScore) -> bool:
    return abs(one.mean - other.mean) <= max(one.std, other.std) + 1e-12


def _cost(score: HeadScore) -> str:
    return f"{score.forwards:.2f} forwards of the network an image and {score.parameters:,} parameters"


def nested_rows(labels: Sequence[int], shares: Sequence[float], order: Sequence[int]) -> dict[float, list[int]]:
    """The rows of each share of the labels: of each class its part, one at least; small shares lie in large ones.

    Args:
        labels: Class id of every row.
        shares: In (0, 1].
        order: All rows, in the order in which they are taken.

    Raises:
        ValueError: For a share outside (0, 1].

    Example:
        >>> nested_rows([0, 0, 1, 1], [0.5, 1.0], [3, 1, 2, 0])
        {0.5: [3, 1], 1.0: [3, 1, 2, 0]}
    """
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong or not shares:
        raise ValueError(f"Shares of the labels lie above 0 and up to 1; got {list(shares)}.")
    of_class: dict[int, list[int]] = {}
    for row in order:
        of_class.setdefault(labels[row], []).append(row)
    found = {}
    for share in sorted(set(shares)):
        kept = {row for rows in of_class.values() for row in rows[: max(1, round(share * len(rows)))]}
        found[share] = [row for row in order if row in kept]
    return found


__all__ = ["Choice", "HeadComparison", "HeadScore", "nested_rows"]
