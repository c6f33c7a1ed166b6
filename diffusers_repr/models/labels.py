"""Names of classes, as the configs of classifiers keep them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def named_ids(names: Mapping[Any, str] | Sequence[str] | None, num_classes: int) -> dict[str, str] | None:
    """Names of classes with the ids as text, as JSON has them.

    Args:
        names: Id -> name, or the names in the order of the ids.
        num_classes: K.

    Raises:
        ValueError: Unless each of the ids 0 to K - 1 has one.

    Example:
        >>> named_ids(["cat", "dog"], 2)
        {'0': 'cat', '1': 'dog'}
    """
    if names is None:
        return None
    named = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    named = {str(key): str(name) for key, name in named.items()}
    if set(named) != {str(i) for i in range(num_classes)}:
        raise ValueError(f"id2label must name the ids 0 to {num_classes - 1}; got {names!r}.")
    return {str(i): named[str(i)] for i in range(num_classes)}


def label_names(config: Mapping[str, Any]) -> list[str]:
    """Name of each class out of a config with `id2label` and `num_classes`; the ids as text where there are none."""
    names = config["id2label"]
    return [names[str(i)] if names else str(i) for i in range(config["num_classes"])]


__all__ = ["label_names", "named_ids"]
