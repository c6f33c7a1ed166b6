"""A picture of a selection: score by noise level and layer."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers_repr.sweep.selection_result import Selection

_TITLES = {
    "accuracy": "validation accuracy (%)",
    "balanced_accuracy": "validation accuracy, mean over classes (%)",
    "neg_brier": "negative squared distance to the one-hot label, validation",
    "r2": "validation R²",
    "neg_mse": "negative mean squared error on validation",
}


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


def draw_heatmap(selection: Selection) -> bytes:
    """PNG of score by layer (rows, in execution order) and noise level (columns, noisier to the right).

    One panel for each noise policy; a frame marks the best cell.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = require_matplotlib()
    policies = list(dict.fromkeys(cell.noise for cell in selection.cells))
    layers = {c.layer: c for c in sorted(selection.cells, key=lambda c: c.order)}
    levels = {c.timestep: c for c in sorted(selection.cells, key=lambda c: (c.nsr, c.timestep))}
    factor = 100 if "accuracy" in selection.metric else 1
    scores = {(c.noise, c.layer, c.timestep): factor * c.score for c in selection.cells}
    low, high = min(scores.values()), max(scores.values())
    width = 3.4 + max(4.0, 0.62 * len(levels)) * len(policies)
    height = 1.9 + max(2.4, 0.26 * len(layers))
    picture = figure.Figure(figsize=(width, height), layout="constrained", dpi=min(140, 20000 / max(width, height)))
    axes = picture.subplots(1, len(policies), sharey=True, squeeze=False)[0]
    image = None
    for panel, policy in zip(axes, policies, strict=True):
        grid = [[scores[policy, layer, level] for level in levels] for layer in layers]
        image = panel.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        clean = policy == "clean"
        names = [f"{t:g}" if clean else f"{t:g}\n{_short(c.nsr)}" for t, c in levels.items()]
        panel.set_xticks(range(len(levels)), names, fontsize=8)
        panel.set_xlabel("timestep told (no noise added)" if clean else "timestep\nnoise-to-signal ratio")
        panel.set_yticks(range(len(layers)), [f"{p}  {c.flops_share:4.0%}" for p, c in layers.items()], fontsize=8)
        if len(policies) > 1:
            panel.set_title(f"noise: {policy}", fontsize=9)
        if len(levels) <= 16:
            _write_values(panel, grid, low, high, factor)
    best = selection.best
    _mark(axes[policies.index(best.noise)], list(levels).index(best.timestep), list(layers).index(best.layer))
    axes[0].set_ylabel("layer, in execution order, and share of the forward's FLOPs")
    picture.colorbar(image, ax=list(axes), label=_TITLES[selection.metric], shrink=0.9)
    picture.suptitle(_title(selection, factor), fontsize=10)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _title(selection: Selection, factor: int) -> str:
    best = selection.best
    digits, unit = (1, " %") if factor == 100 else (3, "")
    value = f"{factor * best.score:.{digits}f}{unit}"
    if best.mean is not None and best.std is not None and len(selection.seeds) > 1:
        value = f"{factor * best.mean:.{digits}f} ± {factor * best.std:.{digits}f}{unit}"
        value += f" over {len(selection.seeds)} noise seeds"
    return f"best: {best.layer} at timestep {best.timestep:g} (noise: {best.noise}), {value}"


def _short(nsr: float) -> str:
    return f"{nsr:.2f}" if nsr < 10 else f"{nsr:.3g}"


def _write_values(panel: Any, grid: list[list[float]], low: float, high: float, factor: int) -> None:
    style = "{:.1f}" if factor == 100 else "{:.2f}"
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            dark = value < low + 0.6 * (high - low)
            panel.text(
                column,
                row,
                style.format(value),
                ha="center",
                va="center",
                fontsize=6.5,
                color="white" if dark else "black",
            )


def _mark(panel: Any, column: int, row: int) -> None:
    from matplotlib.patches import Rectangle

    panel.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2.2, zorder=3))
