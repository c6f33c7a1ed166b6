"""A picture of an alignment sweep: score by layer and by noise level."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from diffusers_repr.sweep.heatmap import require_matplotlib

if TYPE_CHECKING:
    from diffusers_repr.sweep.alignment_result import Alignment

_TITLES = {
    "cknna": "CKNNA",
    "cka": "CKA",
    "linear": "accuracy of a linear probe",
    "knn": "accuracy of nearest neighbours",
}
_NAMED_LAYERS = 40  # up to as many, ticks carry names


def draw_alignment(alignment: Alignment) -> bytes:
    """PNG with a row for each metric: left, score by layer with one line a level; right, by level, one line a layer.

    A dashed line is the encoder's own score, where it has one; a red ring marks the best cell.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = require_matplotlib()
    from matplotlib import colormaps

    layers = {cell.layer: cell for cell in sorted(alignment.cells, key=lambda c: c.order)}
    levels = {cell.timestep: cell for cell in sorted(alignment.cells, key=lambda c: (c.nsr, c.timestep))}
    rows = len(alignment.metrics)
    width, height = 4.5 + min(max(4.0, 0.24 * len(layers)), 12.0) + 4.0, 1.4 + 3.4 * rows
    picture = figure.Figure(figsize=(width, height), layout="constrained", dpi=130)
    axes = picture.subplots(rows, 2, squeeze=False, sharey="row", width_ratios=[width - 6.0, 4.5])
    shades = colormaps["viridis"]
    for (by_layer, by_level), metric in zip(axes, alignment.metrics, strict=True):
        score = {(c.layer, c.timestep): _number(c.scores[metric]) for c in alignment.cells}
        for at, (timestep, cell) in enumerate(levels.items()):
            values = [score[layer, timestep] for layer in layers]
            label = f"{timestep:g} (nsr {cell.nsr:.3g})"
            by_layer.plot(range(len(layers)), values, ".-", color=shades(_share(at, levels)), label=label)
        for at, layer in enumerate(layers):
            values = [score[layer, timestep] for timestep in levels]
            by_level.plot(range(len(levels)), values, ".-", lw=1, color=shades(_share(at, layers)))
        own = alignment.encoder_scores.get(metric)
        if own is not None:
            for panel in (by_layer, by_level):
                panel.axhline(own, color="0.4", ls="--", lw=1)
        _mark(alignment, metric, by_layer, by_level, list(layers), list(levels))
        by_layer.set_ylabel(_TITLES[metric])
        by_layer.legend(title="timestep", fontsize=7, title_fontsize=7)
        last = metric == alignment.metrics[-1]
        names = list(layers) if last and len(layers) <= _NAMED_LAYERS else [""] * len(layers)
        by_layer.set_xticks(range(len(layers)), names, rotation=90, fontsize=7)
        by_level.set_xticks(range(len(levels)), [f"{t:g}" for t in levels], fontsize=8)
        for panel in (by_layer, by_level):
            panel.grid(alpha=0.3)
    axes[-1][0].set_xlabel("layer, in execution order")
    dashed = "\ndashed: the encoder's own" if alignment.encoder_scores else ""
    axes[-1][1].set_xlabel(f"timestep, noisier to the right; darker: earlier layers{dashed}")
    picture.suptitle(_title(alignment), fontsize=10)
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _share(at: int, of: Any) -> float:
    return 0.92 * at / max(len(of) - 1, 1)


def _mark(
    alignment: Alignment, metric: str, by_layer: Any, by_level: Any, layers: list[str], levels: list[float]
) -> None:
    if all(cell.scores[metric] is None for cell in alignment.cells):
        return
    best = alignment.best_of(metric)
    for panel, at in ((by_layer, layers.index(best.layer)), (by_level, levels.index(best.timestep))):
        panel.plot(at, best.scores[metric], "o", ms=9, mfc="none", mec="red", mew=1.6, zorder=5)


def _title(alignment: Alignment) -> str:
    recipe = alignment.recipe
    text = f"{recipe['model']['name'] or recipe['model']['class']} against {recipe['encoder']['name']}"
    text += f", {recipe['data']['samples']} images"
    return text + (f", k={recipe['k']}" if "cknna" in alignment.metrics else "")
