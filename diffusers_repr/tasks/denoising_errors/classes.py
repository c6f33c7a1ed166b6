"""Classes by words or by ids: what a zero-shot classifier chooses among."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers_repr.data.labelled import Labelled
from diffusers_repr.denoiser import Denoiser

TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class ZeroShotClasses:
    """Names of classes, and what the network is told of each.

    Attributes:
        names: One a class.
        prompts: Of each class, one or several; None of class-conditional models.
        class_labels: Id of each class; None of text models.

    Raises:
        ValueError: For fewer than two classes, names, prompts or ids that stand twice, and empty prompts.
    """

    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...] | None = None
    class_labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.class_labels is None):
            raise ValueError("Classes have prompts, or class_labels: give one of the two.")
        told = self.prompts if self.prompts is not None else self.class_labels or ()
        if len(told) != len(self.names):
            raise ValueError(f"{len(self.names)} names for {len(told)} classes; there must be one each.")
        if len(self.names) < 2:
            raise ValueError(
                f"A classifier chooses among two classes or more; got {len(self.names)} ({', '.join(self.names)}). "
                "To tell one thing from all others, give a second class such as 'a photo.'."
            )
        _refuse_twice("The name", self.names)
        if self.class_labels is not None:
            _refuse_twice("The class id", self.class_labels)
        for name, texts in zip(self.names, self.prompts or (), strict=False):
            if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
                raise ValueError(
                    f"Class {name!r} has an empty prompt: the model would be asked about nothing. Write what is to be "
                    "seen."
                )
        if self.prompts is not None:
            _refuse_twice("The prompt", [text for texts in self.prompts for text in texts])

    @classmethod
    def of(cls, denoiser: Denoiser, classes: Any = None, template: str | Sequence[str] = TEMPLATE) -> ZeroShotClasses:
        """Classes for a model, from what people write.

        Args:
            denoiser: The base.
            classes: `ZeroShotClasses`; for text models names, which are put into the template, or a mapping of names
                to a prompt or several; for class-conditional ones ids, names that the pipeline knows (`id2label`
                of DiT), or a mapping of names to ids; None: all classes of such a model.
            template: With `{}` for the name; several give several prompts a class.

        Raises:
            ValueError: For a model without condition; for classes that are not of its kind.
        """
        if isinstance(classes, ZeroShotClasses):
            found = classes
        else:
            kind = denoiser.conditioner.argument if denoiser.conditioner.conditional else None
            if kind == "prompt":
                found = _of_words(classes, template)
            elif kind == "class_labels":
                found = _of_ids(denoiser, classes)
            else:
                raise ValueError(_no_condition(denoiser))
        found.check(denoiser)
        return found

    def check_labels(self, data: Labelled) -> None:
        """Refuse labels of other classes, and warn of classes without images.

        Raises:
            ValueError: If labels, number or order of the data's classes are not these.
        """
        names, low, high = self.names, int(data.targets.min()), int(data.targets.max())
        if low < 0 or high >= len(names):
            raise ValueError(
                f"Labels of {data} run from {low} to {high}; those of these classes from 0 to {len(names) - 1}."
            )
        known = data.label_names
        if known is not None and len(known) != len(names):
            raise ValueError(
                f"{data} has {len(known)} classes ({', '.join(known[:5])}, ...); the classifier has {len(names)} "
                f"({', '.join(names[:5])}, ...). Give one class to each, in the data's order."
            )
        if known is not None and set(known) == set(names) and list(known) != list(names):
            raise ValueError(f"{data} has the same classes in another order: {known}. Bring them to the same order.")
        empty = [name for at, name in enumerate(names) if not bool((data.targets == at).any())]
        if empty:
            warnings.warn(
                f"{len(empty)} of {len(names)} classes have no image in {data}: {', '.join(empty[:5])}"
                f"{', ...' if len(empty) > 5 else ''}. Of these nothing is measured.",
                stacklevel=4,
            )

    def check(self, denoiser: Denoiser) -> None:
        """Raise ValueError unless a model is conditioned on what these classes have."""
        conditioner = denoiser.conditioner
        if not conditioner.conditional or conditioner.argument not in ("prompt", "class_labels"):
            raise ValueError(_no_condition(denoiser))
        wanted = "prompt" if self.prompts is not None else "class_labels"
        if conditioner.argument != wanted:
            takes = {"prompt": "prompts", "class_labels": "class ids"}
            raise ValueError(
                f"{type(denoiser.model).__name__} is told {takes[conditioner.argument]}; these classes have "
                f"{takes[wanted]}."
            )

    @property
    def values(self) -> list[Any]:
        """Every prompt, or every id, class by class."""
        if self.prompts is not None:
            return [text for texts in self.prompts for text in texts]
        return list(self.class_labels or ())

    @property
    def of_value(self) -> list[int]:
        """Class of each of `values`."""
        counts = [len(texts) for texts in self.prompts] if self.prompts is not None else [1] * len(self.names)
        return [place for place, count in enumerate(counts) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.names)


def _no_condition(denoiser: Denoiser) -> str:
    return (
        f"{type(denoiser.model).__name__} is not conditioned on text or classes, so it cannot tell classes apart "
        "without training. Take a text-to-image or class-conditional model, or fit a Probe on this one."
    )


def _of_words(classes: Any, template: str | Sequence[str]) -> ZeroShotClasses:
    if classes is None:
        raise ValueError("A text model needs classes: names, or a mapping of names to prompts.")
    if isinstance(classes, Mapping):
        texts = [(one,) if isinstance(one, str) else tuple(one) for one in classes.values()]
        return ZeroShotClasses(tuple(map(str, classes)), tuple(texts))
    if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"Classes of a text model are names, or a mapping of names to prompts; got {classes!r}.")
    templates = [template] if isinstance(template, str) else list(template)
    wrong = [one for one in templates if one.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(f"A template has {{}} once, where the name goes; got {wrong or templates}.")
    names = list(classes)
    empty = [name for name in names if not name.strip()]
    if empty:
        raise ValueError(f"A class has the empty name {empty[0]!r}; give it a word.")
    return ZeroShotClasses(tuple(names), tuple(tuple(one.replace("{}", name) for one in templates) for name in names))


def _of_ids(denoiser: Denoiser, classes: Any) -> ZeroShotClasses:
    count = int(getattr(denoiser.conditioner, "num_classes", 0))
    known = _known_names(denoiser)
    if classes is None:
        return ZeroShotClasses(tuple(known.get(at, str(at)) for at in range(count)), class_labels=tuple(range(count)))
    if isinstance(classes, Mapping):
        names, ids = list(map(str, classes)), list(classes.values())
    else:
        places = {word: at for at, name in known.items() for word in (name, *map(str.strip, name.split(",")))}
        missing = [one for one in classes if isinstance(one, str) and one not in places]
        if missing:
            few = ", ".join(list(places)[:5])
            says = f"knows {few}, ..." if few else "knows no names: give ids, or a mapping of names to ids"
            raise ValueError(f"This class-conditional model has no class {missing[0]!r}; it {says}.")
        ids = [places[one] if isinstance(one, str) else one for one in classes]
        names = [one if isinstance(one, str) else known.get(one, str(one)) for one in classes]
    wrong = [one for one in ids if isinstance(one, bool) or not hasattr(one, "__index__") or not 0 <= one < count]
    if wrong:
        raise ValueError(f"Class ids of this model are whole numbers from 0 to {count - 1}; got {wrong[0]!r}.")
    return ZeroShotClasses(tuple(names), class_labels=tuple(int(one) for one in ids))


def _known_names(denoiser: Denoiser) -> dict[int, str]:
    table = {} if denoiser.pipe is None else denoiser.pipe.config.get("id2label") or {}
    return {int(at): str(name) for at, name in table.items()}


def _refuse_twice(what: str, values: Sequence[Any]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{what} {twice[0]!r} stands twice: equal ones cannot be told apart. Leave one out.")


__all__ = ["TEMPLATE", "ZeroShotClasses"]
