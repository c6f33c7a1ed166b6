"""Whether two splits share images, told by the hashes of pixels that are made anyway when features are read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from diffusers_repr.data.labelled import Labelled


def tell_overlap(train: Iterable[object], held: Collection[object], train_name: str, held_name: str) -> int:
    """Refuse a split whose images are all among those that are fitted on; warn of some that are.

    Args:
        train: Keys of the images that are fitted on, see `pixel_keys`.
        held: Keys of the images that are scored on.
        train_name: For the message.
        held_name: For the message.

    Returns:
        How many of `held` are in `train`.

    Raises:
        ValueError: If all are.

    Example:
        >>> tell_overlap(["a", "b"], ["c"], "train", "validation")
        0
    """
    known = set(train)
    shared = sum(key in known for key in held)
    if shared and shared == len(held):
        raise ValueError(
            f"All {shared} images of {held_name} are among the {len(known)} of {train_name}, pixel for pixel: a score "
            "on them is that of the fit. Give other images; `hold_out` parts a train split."
        )
    if shared:
        warnings.warn(
            f"{shared} of {len(held)} images of {held_name} are in {train_name} too, pixel for pixel, and make the "
            "score too good. Leave them out of one of the two.",
            stacklevel=3,
        )
    return shared


@dataclass
class Overlap:
    """Collects the keys of two splits while they are read for the first time.

    Attributes:
        keys: By split, in the order of its rows.
        told: Whether `tell` has spoken.
    """

    keys: dict[int, list[str]] = field(default_factory=dict)
    told: bool = False

    def add(self, data: Labelled, rows: slice, keys: Sequence[str]) -> None:
        """Keep the keys of these rows, if they are the next that are not known."""
        if self.told:
            return
        known = self.keys.setdefault(id(data), [])
        if rows.start == len(known):
            known += keys

    def tell(self, train: Labelled, held: Labelled) -> None:
        """`tell_overlap`, once both have been read whole; the keys are let go then."""
        if self.told or any(len(self.keys.get(id(data), ())) != len(data) for data in (train, held)):
            return
        self.told = True
        tell_overlap(self.keys[id(train)], self.keys[id(held)], str(train), str(held))
        self.keys.clear()
