"""The picture of a sweep: score by layer and noise level as a heat map, and curves beside it where wanted."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_repr.sweep.result import Cell

_LEGEND = 12  # up to as many levels have their name beside the curves


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: Above it.
        scores: `(layer, timestep)` -> number; None where there is none.
        best: The cell to mark.
        own: A score to compare with, as a dashed line beside the curves.
        clean: Whether no noise was added, whatever the network is told.
    """

    title: str
    scores: Mapping[tuple[str, float], float | None]
    best: tuple[str, float] | None
    own: float | None = None
    clean: bool = False


def require_matplotlib() -> Any:
    """The `matplotlib.figure` module.

    Raises:
        ImportError: If matplotlib is missing; names the extra.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ImportError('The heat map needs matplotlib: pip install "diffusers-repr[plot]"') from error
    return figure


def draw_sweep(
    cells: Sequence[Cell],
    panels: Sequence[Panel],
    title: str,
    label: str | None = None,
    style: str = "{:.2f}",
    curves: bool = False,
) -> bytes:
    """PNG of panels side by side: layers in execution order downwards, noisier to the right.

    Args:
        cells: Say which layers and levels there are.
        panels: Their scores.
        title: Of the whole.
        label: Of the one scale that all panels share; None: each has a scale of its own.
        style: Of the numbers written into the cells.
        curves: Also draw score by layer, one line a level, beside each heat map.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = require_matplotlib()
    layers = {c.layer: c for c in sorted(cells, key=lambda c: c.order)}
    levels = {c.timestep: c for c in sorted(cells, key=lambda c: (c.nsr, c.timestep))}
    beside = 2.6 if curves else 0.0
    width = 3.4 + (max(4.0, 0.62 * len(levels)) + beside) * len(panels)
    height = 1.9 + max(2.4, 0.26 * len(layers))
    picture = figure.Figure(figsize=(width, height), layout="constrained", dpi=min(140, 20000 / max(width, height)))
    ratios = [max(4.0, 0.62 * len(levels)), *([beside] if curves else [])] * len(panels)
    axes = picture.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    maps, lines = axes[:: 2 if curves else 1], axes[1::2] if curves else [None] * len(panels)
    every = [score for panel in panels for score in panel.scores.values() if score is not None]
    image = None
    for axis, line, panel in zip(maps, lines, panels, strict=True):
        grid = [[_number(panel.scores[layer, level]) for level in levels] for layer in layers]
        own = every if label is not None else [score for score in panel.scores.values() if score is not None]
        low, high = min(own, default=0.0), max(own, default=1.0)
        image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        _name_axes(axis, levels, layers, panel)
        if len(levels) <= 16:
            _write_values(axis, grid, low, high, style)
        if label is None:
            picture.colorbar(image, ax=axis, shrink=0.9)
        if line is not None:
            _draw_curves(line, levels, grid, panel)
        if panel.best is not None:
            row, column = list(layers).index(panel.best[0]), list(levels).index(panel.best[1])
            _mark(axis, column, row)
            if line is not None:
                line.plot(grid[row][column], row, "o", ms=9, mfc="none", mec="red", mew=1.6, zorder=5)
    maps[0].set_ylabel("layer, in execution order, and share of the forward's FLOPs")
    if label is not None:
        picture.colorbar(image, ax=list(maps), label=label, shrink=0.9)
    picture.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _name_axes(axis: Any, levels: Mapping[float, Cell], layers: Mapping[str, Cell], panel: Panel) -> None:
    names = [f"{t:g}" if panel.clean else f"{t:g}\n{_short(c.nsr)}" for t, c in levels.items()]
    axis.set_xticks(range(len(levels)), names, fontsize=8)
    axis.set_xlabel("timestep told (no noise added)" if panel.clean else "timestep\nnoise-to-signal ratio")
    axis.set_yticks(range(len(layers)), [f"{p}  {c.flops_share:4.0%}" for p, c in layers.items()], fontsize=8)
    if panel.title:
        axis.set_title(panel.title, fontsize=9)


def _short(nsr: float) -> str:
    return f"{nsr:.2f}" if nsr < 10 else f"{nsr:.3g}"


def _write_values(axis: Any, grid: list[list[float]], low: float, high: float, style: str) -> None:
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            dark = value < low + 0.6 * (high - low)
            axis.text(
                column,
                row,
                "" if math.isnan(value) else style.format(value),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if dark else "black",
            )


def _draw_curves(axis: Any, levels: Mapping[float, Cell], grid: list[list[float]], panel: Panel) -> None:
    """Score by layer, beside the rows of the heat map; darker lines are less noisy levels."""
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    for at, timestep in enumerate(levels):
        shade = shades(0.92 * at / max(len(levels) - 1, 1))
        axis.plot([row[at] for row in grid], range(len(grid)), ".-", lw=1, color=shade, label=f"{timestep:g}")
    if panel.own is not None:
        axis.axvline(panel.own, color="0.4", ls="--", lw=1)
    if len(levels) <= _LEGEND:
        axis.legend(title="timestep", fontsize=7, title_fontsize=7)
    axis.set_xlabel("score by layer")
    axis.grid(alpha=0.3)


def _mark(axis: Any, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.2, zorder=3))
