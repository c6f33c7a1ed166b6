"""Names of classes, as the configs of classifiers keep them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Labels = int | str | Sequence[int] | Sequence[str] | Tensor


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


def class_ids(given: Labels | None, names: Sequence[str]) -> Tensor | None:
    """Ids of classes given by id or by name, one or several.

    Args:
        given: Ids or names; None for none.
        names: Of all classes, in the order of the ids.

    Returns:
        int64 `(N,)` on the CPU, or None.

    Raises:
        TypeError: For what is neither id nor name.
        ValueError: For a class that is not there.

    Example:
        >>> class_ids(["dog", "cat"], ["cat", "dog"])
        tensor([1, 0])
    """
    if given is None:
        return None
    if not names:
        raise ValueError("This model has no classes (num_classes=0); leave class_labels out.")
    values: Any = given
    if isinstance(given, str) or (isinstance(given, Sequence) and any(isinstance(part, str) for part in given)):
        asked = [given] if isinstance(given, str) else list(given)
        unknown = [name for name in asked if name not in names]
        if unknown:
            raise ValueError(f"No class has the names {unknown}; the classes are {list(names)[:10]}.")
        values = [names.index(str(name)) for name in asked]
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_labels are ids or names, one or one a sample; got {given!r}.") from error
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1 or not labels.numel():
        raise TypeError(f"class_labels are ids or names, one or one a sample; got {given!r}.")
    if int(labels.min()) < 0 or int(labels.max()) >= len(names):
        raise ValueError(f"class_labels must lie in 0..{len(names) - 1}; got {labels.tolist()}.")
    return labels.reshape(-1).long().cpu()


def class_or_null_ids(
    given: Labels | None, null: int | None, ids_of: Callable[[str | Sequence[str]], list[int]]
) -> Tensor | None:
    """Ids of classes given by id or by name, for a network with a null class behind the others.

    Args:
        given: Ids or names, one or several; None for none.
        null: Id of the null class, the number of classes; None of a network without classes.
        ids_of: From names to ids.

    Returns:
        int64 `(N,)`, as many as were given, or None.

    Raises:
        TypeError: For what is neither id nor name.
        ValueError: For a class that is not there, and of a network without classes.

    Example:
        >>> class_or_null_ids([0, 10], 10, lambda names: [])
        tensor([ 0, 10])
    """
    if given is None:
        return None
    if null is None:
        raise ValueError("This model has no classes (num_classes=0); leave class_labels out.")
    named = isinstance(given, str) or (isinstance(given, Sequence) and len(given) > 0 and isinstance(given[0], str))
    try:
        labels = torch.as_tensor(ids_of(given) if named else given)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"class_labels are whole numbers or names; got {given!r}.") from error
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.ndim > 1:
        raise TypeError(f"class_labels are whole numbers, one or one a sample; got {given!r}.")
    labels = labels.reshape(-1).long()
    outside = [label for label in labels.tolist() if not 0 <= label <= null]
    if outside:
        raise ValueError(f"class_labels are from 0 to {null - 1}, or {null} for the null class; got {outside[:10]}.")
    return labels


class ClassNamesMixin:
    """Of a pipeline: ids of classes by their names, as diffusers' `DiTPipeline` has them.

    Attributes:
        labels: Id of each name; a class may have several, parted by commas.
    """

    labels: dict[str, int]

    def register_class_names(self: Any, id2label: Mapping[Any, str] | None) -> None:
        """Keep names in the config, with ids as text, as JSON has them."""
        self.register_to_config(id2label=None if id2label is None else {str(k): v for k, v in id2label.items()})
        names = ((name.strip(), int(key)) for key, value in (id2label or {}).items() for name in value.split(","))
        self.labels = dict(sorted(names))

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Class ids of names.

        Raises:
            ValueError: For a name that `id2label` does not have.
        """
        names = [label] if isinstance(label, str) else list(label)
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            known = ", ".join(list(self.labels)[:10]) or "none: the pipeline has no id2label"
            raise ValueError(f"No class has the names {unknown}. Known names, see `pipe.labels`: {known}.")
        return [self.labels[name] for name in names]


__all__ = ["ClassNamesMixin", "Labels", "class_ids", "class_or_null_ids", "label_names", "named_ids"]
