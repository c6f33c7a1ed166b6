"""`Vocabulary`: the names of classes, with their synonyms, as they are asked for in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Vocabulary:
    """Classes in words.

    Attributes:
        classes: For each class its name and, behind it, synonyms.
        stuff: Numbers of the classes that have no instances, such as sky.

    Raises:
        ValueError: For a class without a name, and a name that stands twice.

    Example:
        >>> words = Vocabulary.of(["cat, kitten", "sky"], stuff=["sky"])
        >>> words.classes, words.stuff, words.prompts("a {}")
        ((('cat', 'kitten'), ('sky',)), frozenset({1}), ['a cat', 'a kitten', 'a sky'])
    """

    classes: tuple[tuple[str, ...], ...]
    stuff: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("A vocabulary needs at least one class.")
        seen: dict[str, int] = {}
        for number, names in enumerate(self.classes):
            if not names or not all(isinstance(name, str) and name.strip() for name in names):
                raise ValueError(f"Class {number} is {list(names)}; it needs a name, and each of its names a letter.")
            for name in names:
                key = " ".join(name.lower().split())
                if key in seen:
                    other = self.classes[seen[key]][0]
                    raise ValueError(
                        f"{name!r} of class {number} ({names[0]!r}) is a name of class {seen[key]} ({other!r}) too; "
                        "each name belongs to one class, once."
                    )
                seen[key] = number
        wrong = [number for number in self.stuff if not 0 <= number < len(self.classes)]
        if wrong:
            raise ValueError(f"There is no class {wrong[0]} that could be stuff; there are {len(self.classes)}.")

    @classmethod
    def of(cls, classes: Iterable[str | Sequence[str]], stuff: Collection[str] = ()) -> Vocabulary:
        """From names: synonyms parted by commas in one text, or as a list.

        Args:
            classes: Each a text or a list of texts.
            stuff: Names of those that have no instances.

        Raises:
            ValueError: As the class; for stuff that is no class.
        """
        if isinstance(classes, str):
            raise ValueError(f"A vocabulary is a list with one text a class; got the text {classes!r}.")
        parts = [one.split(",") if isinstance(one, str) else list(one) for one in classes]
        made = cls(tuple(tuple(name.strip() for name in names) for names in parts))
        places = {name: number for number, names in enumerate(made.classes) for name in names}
        missing = [name for name in stuff if name not in places]
        if missing:
            raise ValueError(f"stuff names {missing[0]!r}, which is no class; those are {', '.join(made.names)}.")
        return cls(made.classes, frozenset(places[name] for name in stuff))

    @property
    def names(self) -> tuple[str, ...]:
        """The first name of each class."""
        return tuple(names[0] for names in self.classes)

    @property
    def counts(self) -> tuple[int, ...]:
        """How many names each class has."""
        return tuple(len(names) for names in self.classes)

    def prompts(self, template: str = TEMPLATE) -> list[str]:
        """One prompt a name, class after class.

        Args:
            template: With `{}` where the name goes.

        Raises:
            ValueError: For a template without one place for it.
        """
        if template.count("{}") != 1:
            raise ValueError(f"template={template!r} needs one {{}}, where the name goes.")
        return [template.replace("{}", name) for names in self.classes for name in names]

    def known(self, other: Vocabulary) -> tuple[bool, ...]:
        """For each class whether it shares a name with a class of another vocabulary, that of the training."""
        names = {name for one in other.classes for name in one}
        return tuple(not names.isdisjoint(own) for own in self.classes)


__all__ = ["TEMPLATE", "Vocabulary"]
