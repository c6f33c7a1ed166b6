"""Arguments of diffusers' `from_pretrained` by the names that the version installed knows."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

_DTYPE_SINCE = (0, 40)


def loading_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with `dtype` as `torch_dtype` where diffusers is older than 0.40.

    Before, its pipelines pass over `dtype`, so that weights are float32, and its models refuse it.

    Args:
        given: Keyword arguments of a `from_pretrained`.

    Returns:
        A copy.

    Example:
        >>> list(loading_arguments({"variant": "fp16"}))
        ['variant']
    """
    major, minor = version("diffusers").split(".")[:2]
    if (int(major), int(minor)) >= _DTYPE_SINCE or "dtype" not in given:
        return dict(given)
    rest = {name: value for name, value in given.items() if name != "dtype"}
    return {**rest, "torch_dtype": given["dtype"]}


__all__ = ["loading_arguments"]
