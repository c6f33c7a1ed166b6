"""Whether two splits share images, told by the hashes of pixels that are made anyway when features are read."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable


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
