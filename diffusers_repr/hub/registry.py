"""One registry for all that users add by name: classes by their names, and what is said where a name is not right."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(dict[str, type[T]]):
    """Name -> class.

    Args:
        what: What one is called, such as `head`.
        base: What all are subclasses of.
        function: The public function that registers.
        one_name: Whether a class has one name, its `kind`; files then name it by its class, whose name is its own too.

    Example:
        >>> colours = Registry("colour", object, "register_colour")
        >>> @colours.register("red", "crimson")
        ... class Red: ...
        >>> colours.find("blue")
        Traceback (most recent call last):
        ...
        ValueError: Unknown colour 'blue'; expected one of crimson, red. `register_colour` adds one of your own.
    """

    def __init__(self, what: str, base: type[T], function: str, *, one_name: bool = False) -> None:
        super().__init__()
        self.what, self.base, self.function, self.one_name = what, base, function, one_name

    def register(self, *names: str) -> Callable[[C], C]:
        """Make a class known by names.

        Raises:
            TypeError: For another class than a subclass of `base`.
            ValueError: If a name, or where it counts the name of the class, is taken; a class of a notebook or script
                takes the place of an earlier one at the same path.
        """

        def add(cls: C) -> C:
            added: type = cls
            if not (inspect.isclass(added) and issubclass(added, self.base)):
                raise TypeError(f"{self.function} takes a subclass of {self.base.__name__}; got {cls!r}.")
            for name, other in self.items():
                if cls.__module__ == "__main__" and _path(other) == _path(cls):
                    continue  # a notebook's cell that runs again
                if name in names or (self.one_name and other.__name__ == cls.__name__):
                    raise ValueError(
                        f"{self.function}({', '.join(map(repr, names))}) of {cls.__module__}.{cls.__name__}: {name!r} "
                        f"is the {self.what} {other.__module__}.{other.__name__} already. Choose another name"
                        f"{' for kind and class' if self.one_name else ''}."
                    )
            self.update(dict.fromkeys(names, added))
            if self.one_name:
                setattr(cls, "kind", names[0])  # noqa: B010
            return cls

        return add

    def subclasses(self, base: type[T] | tuple[type[T], ...] | None = None) -> dict[str, type[T]]:
        """Those of a subclass of `base`, or of one of several, all if None, by name in order."""
        return {name: cls for name, cls in sorted(self.items()) if issubclass(cls, base or self.base)}

    def find(self, name: str, base: type[T] | tuple[type[T], ...] | None = None) -> type[T]:
        """The class of a name, among `subclasses(base)`.

        Raises:
            ValueError: With the names there are.
        """
        known = self.subclasses(base)
        if name not in known:
            raise ValueError(
                f"Unknown {self.what} {name!r}; expected one of {', '.join(known)}. `{self.function}` adds one of "
                "your own."
            )
        return known[name]


def _path(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


__all__ = ["Registry"]
