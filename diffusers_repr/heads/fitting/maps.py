"""Maps and labels to a fitted head, under a protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.heads.base import head_class
from diffusers_repr.heads.fitting.fit import FitResult, check_class_ids, check_head_options, check_several_classes
from diffusers_repr.heads.fitting.minibatch import descend
from diffusers_repr.heads.fitting.protocols import MinibatchProtocol, Protocol, get_protocol
from diffusers_repr.heads.map_classifier import MapClassifier

Maps = Mapping[str, Tensor]
_ROWS = 256  # of a forward that only measures


def fit_map_head(
    maps: Maps,
    labels: Tensor,
    num_classes: int | None = None,
    *,
    head: str = "attention",
    levels: int = 1,
    protocol: str | Protocol | None = None,
    validation: tuple[Maps, Tensor] | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> FitResult:
    """Fit a head on maps that are computed once.

    Args:
        maps: Layer path -> `(N, C, h, w)`; of several levels `(levels, N, C, h, w)`. Any floating dtype; a batch is
            made float32 as it is used.
        labels: `(N,)` class ids from 0.
        num_classes: K; the largest label and one if None.
        head: `attention`, `convolution`, or what `register_head` was given.
        levels: Noise levels of the maps.
        protocol: A name of `PROTOCOLS`, a protocol of your own, or None for the head's default.
        validation: Maps and labels to measure on; they are not looked at in fitting.
        generator: CPU generator of every draw, seeded with 0 if None; the global random state is not touched.
        **options: Further arguments of the head's class.

    Returns:
        The head, in eval mode on the maps' device, the protocol as it was run, and the accuracy on `validation`.

    Raises:
        ValueError: For maps and labels that do not fit, are not finite or have fewer than two classes, an unknown head
            or protocol, options the head does not have, or a head that needs the network in every step.
        FloatingPointError: If a loss is not finite.

    Example:
        >>> x = torch.randn(60, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        >>> small = {"width": 16, "num_attention_heads": 2}
        >>> fit_map_head({"mid_block": x}, (x.mean((1, 2, 3)) > 0).long(), **small).head({"mid_block": x}).shape
        torch.Size([60, 2])
    """
    cls = head_class(head, MapClassifier)
    assert issubclass(cls, MapClassifier)
    check_reads_once(head)
    chosen = get_protocol(protocol, head)
    assert isinstance(chosen, MinibatchProtocol)
    check_head_options(head, options)
    labels = torch.as_tensor(labels)
    if num_classes is None:
        num_classes = int(labels.max()) + 1 if len(labels) else 0
    _check_maps(maps, labels, num_classes, levels, "training")
    check_several_classes(labels)
    if validation is not None:
        validation = (validation[0], torch.as_tensor(validation[1]))
        _check_maps(*validation, num_classes, levels, "validation")
        check_several_classes(labels, validation[1])
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    made = draw_head(cls, maps, num_classes, levels, generator, options)
    device = next(iter(maps.values())).device
    target = labels.to(device).long()
    made.to(device).train()

    def loss(rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(made(take_rows(maps, rows, levels)), target[rows])

    losses = descend(list(made.parameters()), loss, len(labels), chosen, generator)
    made.eval()
    accuracy = None if validation is None else map_accuracy(made, *validation)
    return FitResult(made, {**chosen.describe(), "chosen": {"final_loss": losses[-1]}}, accuracy)


def check_reads_once(kind: str) -> None:
    """Raise ValueError for a head that is not fitted on features which are computed once."""
    if not getattr(head_class(kind), "reads_once", True):
        raise ValueError(
            f"{kind!r} changes the maps it reads as it learns, and needs the network in every step: train it by "
            "examples/train_probe.py."
        )


def draw_head(
    cls: type[MapClassifier],
    maps: Maps,
    num_classes: int,
    levels: int,
    generator: torch.Generator,
    options: Mapping[str, Any],
) -> MapClassifier:
    """A new head for such maps, whose weights `generator` alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        return cls.for_maps(maps, num_classes, levels, **options)


def take_rows(maps: Maps, rows: Tensor | slice, levels: int) -> dict[str, Tensor]:
    """The maps of some images."""
    return {path: one[:, rows] if levels > 1 or one.ndim == 5 else one[rows] for path, one in maps.items()}


@torch.no_grad()
def map_accuracy(head: MapClassifier, maps: Maps, labels: Tensor) -> float:
    """Share of images whose largest logit is at the label."""
    levels, device, hits = int(head.config["levels"]), next(head.parameters()).device, 0
    for start in range(0, len(labels), _ROWS):
        rows = slice(start, start + _ROWS)
        part = {path: one.to(device) for path, one in take_rows(maps, rows, levels).items()}
        hits += int((head(part).argmax(1).cpu() == labels[rows].cpu()).sum())
    return hits / len(labels)


def _check_maps(maps: Maps, labels: Tensor, num_classes: int, levels: int, what: str) -> None:
    if not maps:
        raise ValueError(f"There are no {what} maps.")
    for path, one in maps.items():
        lead = 2 if levels > 1 or one.ndim == 5 else 1
        if one.ndim != lead + 3 or (lead == 2 and len(one) != levels) or not one.shape[lead - 1]:
            raise ValueError(
                f"The {what} maps of {path!r} must be ({f'{levels}, ' * (levels > 1)}N, C, h, w); got "
                f"{tuple(one.shape)}."
            )
        check_class_ids(labels, one.shape[lead - 1], num_classes, what)
        if not all(bool(torch.isfinite(part).all()) for part in one):
            raise ValueError(
                f"The {what} maps of {path!r} are not all finite; check the images and the model's dtype."
            )


__all__ = ["check_reads_once", "draw_head", "fit_map_head", "map_accuracy", "take_rows"]
