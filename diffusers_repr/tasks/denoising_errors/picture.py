"""The picture of errors by level: where classes part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from diffusers_repr.pictures.figure import require_matplotlib


def plot_curves(timesteps: Tensor, errors: Tensor, names: Sequence[str], title: str, image: Any = None) -> Any:
    """How far the error of each class lies over the lowest one of each level.

    Args:
        timesteps: `(L,)`.
        errors: `(L, K)`, NaN where a class was not evaluated.
        names: Of the classes, the winner first.
        title: Above.
        image: Shown beside (PIL).
    """
    figures = require_matplotlib()
    figure = figures.Figure(figsize=(8 if image is None else 10, 4), layout="constrained")
    if image is None:
        axes = figure.add_subplot()
    else:
        left, axes = figure.subplots(1, 2, width_ratios=(1, 4))
        left.imshow(np.asarray(image), cmap="gray" if getattr(image, "mode", "") == "L" else None)
        left.axis("off")
    values = errors.numpy()
    over = values - np.nanmin(values, axis=1, keepdims=True)
    for place, name in enumerate(names):
        there = np.isfinite(over[:, place])
        style = {"linewidth": 2.5, "color": "black", "zorder": 5} if place == 0 else {"linewidth": 1.2}
        axes.plot(timesteps.numpy()[there], over[there, place], marker="o", markersize=3, label=name, **style)
    axes.set_xlabel("timestep (larger is noisier)")
    axes.set_ylabel("error over the level's lowest")
    axes.set_title(title)
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    return figure


__all__ = ["plot_curves"]
