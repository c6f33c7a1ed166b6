"""Figures of matplotlib, which is an extra, without the state that pyplot keeps."""

from __future__ import annotations

import io
from typing import Any


def require_matplotlib() -> Any:
    """The `matplotlib.figure` module.

    Raises:
        ImportError: If matplotlib is missing; names the extra.
    """
    try:
        from matplotlib import figure
    except ImportError as error:
        raise ImportError('This picture needs matplotlib: pip install "diffusers-repr[plot]"') from error
    return figure


def png_of(figure: Any) -> bytes:
    """A figure as PNG, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


__all__ = ["png_of", "require_matplotlib"]
