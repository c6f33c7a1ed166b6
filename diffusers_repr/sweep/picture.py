"""The picture of a sweep: score by layer and noise level as a heat map, and curves beside it where wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_repr.pictures.figure import png_of, require_matplotlib
from diffusers_repr.sweep.result import Cell

_NAMED = 5  # layers, the best ones, that have colour and name among the curves
_LEVELS = 3  # from as many on, curves run over levels

Grid = list[list[float]]  # a row for each layer, a column for each level, NaN where there is no score


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: Above it.
        scores: `(layer, timestep)` -> number; None where there is none.
        best: The cell to mark.
        own: A score to compare with, as a dashed line beside the curves.
        clean: Whether no noise was added, whatever timestep the network is given.
    """

    title: str
    scores: Mapping[tuple[str, float], float | None]
    best: tuple[str, float] | None
    own: float | None = None
    clean: bool = False


def draw_sweep(
    cells: Sequence[Cell],
    panels: Sequence[Panel],
    title: str,
    label: str | None = None,
    style: str = "{:.2f}",
    curves: bool = False,
    lower_is_better: bool = False,
) -> bytes:
    """PNG of panels side by side: layers in execution order downwards, noisier to the right.

    Colours run over the scores of all layers but the worst one, which would take most of them for itself; what lies
    beyond has the colour of the end, and the bar an arrow.

    Args:
        cells: Say which layers and levels there are.
        panels: Their scores.
        title: Of the whole.
        label: Of the one scale that all panels share; None: each has a scale of its own.
        style: Of the numbers written into the cells.
        curves: Also draw curves beside each heat map: score by level of the best layers, which are named, and of the
            others in grey; by layer where there are only one or two levels.
        lower_is_better: Whether scores are errors.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = require_matplotlib()
    layers = {c.layer: c for c in sorted(cells, key=lambda c: c.order)}
    levels = {c.timestep: c for c in sorted(cells, key=lambda c: (c.nsr, c.timestep))}
    beside = 3.4 if curves else 0.0
    width = 3.4 + (max(4.0, 0.62 * len(levels)) + beside) * len(panels)
    tall = max(2.8 if curves else 2.4, 0.26 * len(layers))
    height = tall + (2.9 if curves else 1.9)  # below curves stand the names of layers
    picture = figure.Figure(figsize=(width, height), layout="constrained", dpi=min(140, 20000 / max(width, height)))
    ratios = [max(4.0, 0.62 * len(levels)), *([beside] if curves else [])] * len(panels)
    axes = picture.subplots(1, len(ratios), squeeze=False, width_ratios=ratios)[0]
    maps, lines = axes[:: 2 if curves else 1], axes[1::2] if curves else [None] * len(panels)
    grids: list[Grid] = [[[_number(p.scores[a, t]) for t in levels] for a in layers] for p in panels]
    shared = _colour_range(grids, lower_is_better)
    for axis, line, panel, grid in zip(maps, lines, panels, grids, strict=True):
        low, high, extend = shared if label is not None else _colour_range([grid], lower_is_better)
        colours = "viridis_r" if lower_is_better else "viridis"
        image = axis.imshow(grid, aspect="auto", cmap=colours, vmin=low, vmax=high)
        _name_axes(axis, levels, layers, panel, axis is maps[0])
        if len(levels) <= 16:
            _write_values(axis, grid, image, style)
        if label is None:
            picture.colorbar(image, ax=axis, shrink=0.9, extend=extend)
        elif axis is maps[-1]:
            picture.colorbar(image, ax=list(maps), label=label, shrink=0.9, extend=extend)
        if line is not None:
            _draw_curves(line, levels, list(layers), grid, panel, lower_is_better)
            _name_curves(line, 0.7 / tall, len(levels) >= _LEVELS and len(layers) > _NAMED)
        if panel.best is not None:
            _mark(axis, list(levels).index(panel.best[1]), list(layers).index(panel.best[0]))
    maps[0].set_ylabel("layer, in execution order;\nshare of the forward's FLOPs")
    picture.suptitle(title, fontsize=10)
    return png_of(picture)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _colour_range(grids: Sequence[Grid], lower_is_better: bool) -> tuple[float, float, str]:
    """Lowest and highest score of all layers but the worst, and to which side others lie beyond (`extend`)."""
    rows = [[v for grid in grids for v in grid[at] if not math.isnan(v)] for at in range(len(grids[0]))]
    known = [row for row in rows if row]
    scores = [v for row in known for v in row]
    if not scores:
        return 0.0, 1.0, "neither"
    if len(known) > 2:
        order = sorted(known, key=lambda row: sum(row) / len(row), reverse=not lower_is_better)
        known = order[:-1]
    low, high = min(map(min, known)), max(map(max, known))
    beyond = min(scores) < low, max(scores) > high
    return low, high, {(True, False): "min", (False, True): "max", (True, True): "both"}.get(beyond, "neither")


def _name_axes(
    axis: Any, levels: Mapping[float, Cell], layers: Mapping[str, Cell], panel: Panel, name_layers: bool
) -> None:
    axis.set_xticks(range(len(levels)), _level_names(levels, panel), fontsize=8)
    axis.set_xlabel("timestep given to the network\n(image without noise)" if panel.clean else _LEVEL)
    names = [f"{path}  {cell.flops_share:4.0%}" for path, cell in layers.items()]
    axis.set_yticks(range(len(layers)), names if name_layers else [], fontsize=8)
    if panel.title:
        axis.set_title(panel.title, fontsize=9)


_LEVEL = "timestep\nnoise-to-signal ratio"


def _level_names(levels: Mapping[float, Cell], panel: Panel) -> list[str]:
    return [f"{t:g}" if panel.clean else f"{t:g}\n{_ratio(c.nsr)}" for t, c in levels.items()]


def _ratio(nsr: float) -> str:
    return f"{nsr:.2f}" if nsr < 10 else f"{nsr:.3g}"


def _write_values(axis: Any, grid: Grid, image: Any, style: str) -> None:
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if math.isnan(value):
                continue
            red, green, blue, _ = image.to_rgba(value)
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
            axis.text(column, row, style.format(value), ha="center", va="center", fontsize=6.5, color=ink)


def _draw_curves(
    axis: Any,
    levels: Mapping[float, Cell],
    layers: Sequence[str],
    grid: Grid,
    panel: Panel,
    lower_is_better: bool,
) -> None:
    """Score by level, a line a layer; with one or two levels score by layer, a line a level."""
    if len(levels) < _LEVELS:
        for at, timestep in enumerate(levels):
            axis.plot(range(len(layers)), [row[at] for row in grid], ".-", lw=1, label=f"timestep {timestep:g}")
        axis.set_xlabel("layer, in execution order")
    else:
        sign = -1 if lower_is_better else 1
        peaks = {at: max(sign * v for v in row if not math.isnan(v)) for at, row in enumerate(grid) if _any(row)}
        named = sorted(peaks, key=lambda at: -peaks[at])[:_NAMED]
        for at in peaks:
            if at not in named:
                axis.plot(range(len(levels)), grid[at], "-", lw=0.8, color="0.8", zorder=1)
        for at in named:
            axis.plot(range(len(levels)), grid[at], ".-", lw=1.4, label=layers[at])
        axis.set_xticks(range(len(levels)), _level_names(levels, panel), fontsize=8)
        axis.set_xlabel(_LEVEL)
    if panel.own is not None:
        axis.axhline(panel.own, color="0.4", ls="--", lw=1)
    if panel.best is not None:
        row, column = layers.index(panel.best[0]), list(levels).index(panel.best[1])
        at = column if len(levels) >= _LEVELS else row
        axis.plot(at, grid[row][column], "o", ms=9, mfc="none", mec="red", mew=1.6, zorder=5)
    axis.set_title(panel.title, fontsize=9)
    axis.grid(alpha=0.3)


def _name_curves(axis: Any, below: float, others: bool) -> None:
    """A legend under the axis, where the names of layers, which are long, hide nothing."""
    if axis.get_legend_handles_labels()[0]:
        place = {"loc": "upper left", "bbox_to_anchor": (0, -below), "borderaxespad": 0}
        title = "best layers; others grey" if others else None
        axis.legend(title=title, fontsize=7, title_fontsize=7, frameon=False, **place)


def _any(row: Sequence[float]) -> bool:
    return any(not math.isnan(value) for value in row)


def _mark(axis: Any, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.2, zorder=3))


__all__ = ["Panel", "draw_sweep"]
