"""A heat map of mixing weights: layers down, noise levels across."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffusers_repr.pictures.figure import require_matplotlib

_LETTERS = 30  # of a layer's name that are shown


def mixing_figure(shares: Tensor, layers: Sequence[str], levels: Sequence[str], title: str = "") -> Any:
    """A figure of matplotlib with the share of each layer at each level, and the sums of both in the margins.

    Args:
        shares: `(levels, layers)`, not negative, 1 in all.
        layers: Their names.
        levels: Their names, least noisy first.
        title: Above.

    Raises:
        ValueError: For names that are not as many.
        ImportError: If matplotlib is missing.
    """
    if shares.shape != (len(levels), len(layers)):
        raise ValueError(f"{len(levels)} levels and {len(layers)} layers name shares {tuple(shares.shape)}.")
    values = shares.detach().float().cpu().T.numpy()
    rows, columns = values.shape
    size = (3.2 + 0.5 * columns, 1.6 + 0.28 * rows)
    figure = require_matplotlib().Figure(figsize=size, layout="constrained")
    (top, corner), (main, side) = figure.subplots(
        2, 2, width_ratios=(max(columns, 3), 1.5), height_ratios=(1.2, max(rows, 3) * 0.6)
    )
    corner.axis("off")
    image = main.imshow(values, aspect="auto", cmap="viridis", vmin=0)
    main.set_xticks(range(columns), levels, rotation=90 if columns > 8 else 0)
    main.set_yticks(range(rows), [name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}" for name in layers])
    main.set_xlabel("timestep that the network was told (right is noisier)")
    top.bar(range(columns), values.sum(0), color="#33638d")
    top.set_xlim(main.get_xlim())
    top.set_xticks([])
    side.barh(range(rows), values.sum(1), color="#33638d")
    side.set_ylim(main.get_ylim())
    side.set_yticks([])
    for axis in (top.yaxis, side.xaxis):
        axis.set_major_formatter("{x:.0%}")
        axis.set_tick_params(labelsize="small")
    figure.colorbar(image, ax=side, format="{x:.1%}", fraction=0.4)
    if title:
        figure.suptitle(title)
    return figure


__all__ = ["mixing_figure"]
