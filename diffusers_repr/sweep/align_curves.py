"""The picture of a comparison: alignment by depth, and by training steps or size, a row each encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from diffusers_repr.hub.places import short_name
from diffusers_repr.pictures.figure import png_of, require_matplotlib

_LEGEND = 10  # up to as many models have their name beside the curves
_TITLES = {"cknna": "CKNNA", "cka": "CKA"}


class Compared(Protocol):
    """What the picture shows of an `AlignmentComparison`."""

    @property
    def metric(self) -> str:
        """What was measured."""

    @property
    def models(self) -> Mapping[str, Mapping[str, Any]]:
        """Label -> parameters, step and the like."""

    @property
    def encoders(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> fingerprint."""

    @property
    def between(self) -> Mapping[str, Mapping[str, float | None]]:
        """Encoder -> other encoder -> score."""

    @property
    def recipe(self) -> Mapping[str, Any]:
        """Samples and settings."""

    def cells_of(self, model: str, encoder: str) -> Sequence[Any]:
        """All cells of a model against an encoder."""

    def is_defined(self, model: str, encoder: str) -> bool:
        """Whether any of them has a score."""

    def best_of(self, model: str, encoder: str) -> Any:
        """The one that scores highest."""


def draw_comparison(found: Compared) -> bytes:
    """PNG of a comparison, as `AlignmentComparison.plot` tells.

    Raises:
        ImportError: If matplotlib is missing.
    """
    return png_of(comparison_figure(found))


def comparison_figure(found: Compared) -> Any:
    """The `matplotlib.figure.Figure` of a comparison.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib import colormaps

    rows = len(found.encoders)
    figure = require_matplotlib().Figure(figsize=(9.6, 0.7 + 3.0 * rows), layout="constrained", dpi=130)
    axes = figure.subplots(rows, 2, squeeze=False, sharex="col", sharey="row")
    count = max(len(found.models) - 1, 1)
    shades = {label: colormaps["viridis"](0.9 * at / count) for at, label in enumerate(found.models)}
    name = _TITLES.get(found.metric, found.metric)
    for (left, right), encoder in zip(axes, found.encoders, strict=True):
        _by_depth(left, found, encoder, shades)
        _by_training(right, found, encoder, shades)
        for axis in (left, right):
            _other_encoders(axis, found, encoder)
            axis.grid(alpha=0.3)
        left.set_ylabel(f"{name} with\n{short_name(encoder)}", fontsize=8)
    axes[0][0].set_title("by depth, at each model's best noise level", fontsize=9)
    axes[0][1].set_title("best layer and level of each model", fontsize=9)
    if len(found.models) <= _LEGEND:
        axes[0][0].legend(fontsize=7)
    axes[-1][0].set_xlabel("depth of the layer, share of all")
    axes[-1][1].set_xlabel("training steps" if _has_steps(found) else "parameters, in millions")
    samples = found.recipe["data"]["samples"]
    k = found.recipe["settings"].get("k")
    figure.suptitle(f"{samples} images" + (f", k={k}" if k else "") + _dashed(found), fontsize=10)
    return figure


def _dashed(found: Compared) -> str:
    return "; dashed: another encoder against this one" if len(found.encoders) > 1 else ""


def _by_depth(axis: Any, found: Compared, encoder: str, shades: dict[str, Any]) -> None:
    for label, shade in shades.items():
        if not found.is_defined(label, encoder):
            continue
        best = found.best_of(label, encoder)
        curve = [c for c in found.cells_of(label, encoder) if c.timestep == best.timestep and c.score is not None]
        last = max(max(c.order for c in found.cells_of(label, encoder)), 1)
        axis.plot([c.order / last for c in curve], [c.score for c in curve], ".-", lw=1.2, color=shade, label=label)


def _by_training(axis: Any, found: Compared, encoder: str, shades: dict[str, Any]) -> None:
    """A point each model: by step, one line each size, or by size where no steps are told."""
    by_step = _has_steps(found)
    lines: dict[Any, list[tuple[float, float, str]]] = {}
    for label, about in found.models.items():
        if not found.is_defined(label, encoder):
            continue
        score = found.best_of(label, encoder).score
        at, line = (about["step"], about["parameters"]) if by_step else (about["parameters"] / 1e6, None)
        lines.setdefault(line, []).append((at, score, label))
    for size, points in sorted(lines.items(), key=lambda item: item[0] or 0):
        points.sort()
        if len(points) > 1:
            axis.plot([x for x, _, _ in points], [y for _, y, _ in points], "-", lw=0.8, color="0.6", zorder=1)
        if size is not None and len(lines) > 1:
            x, y, _ = points[-1]
            axis.annotate(_millions(size), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
        for x, y, label in points:
            axis.plot([x], [y], "o", ms=6, color=shades[label])
    if not by_step and len({point[0] for points in lines.values() for point in points}) > 1:
        axis.set_xscale("log")


def _other_encoders(axis: Any, found: Compared, encoder: str) -> None:
    for other, score in found.between.get(encoder, {}).items():
        if score is not None:
            axis.axhline(score, color="0.35", ls="--", lw=0.9)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "xytext": (-3, 2)}
            axis.annotate(short_name(other), (1, score), **place, ha="right", fontsize=7, color="0.35")


def _has_steps(found: Compared) -> bool:
    return all(about["step"] is not None for about in found.models.values())


def _millions(count: int) -> str:
    return f"{count / 1e6:.3g} M"


__all__ = ["comparison_figure", "draw_comparison"]
