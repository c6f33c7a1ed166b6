"""Training a `PixelEnsembleHead`: all members in one batched pass, each as if it were trained alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_repr.features.noise_policy import keyed_generator
from diffusers_repr.features.sampled_maps import SampledMaps
from diffusers_repr.heads.base import Head
from diffusers_repr.heads.fitting.pixel_steps import MemberSteps
from diffusers_repr.heads.fitting.protocols import Protocol
from diffusers_repr.heads.pixel_ensemble import PixelEnsembleHead


@dataclass(frozen=True)
class PixelProtocol(Protocol):
    """Cross-entropy on single pixels in a shuffled order, every member its own, until its losses stop falling.

    Attributes:
        learning_rate: Of Adam.
        batch_size: Pixels of a step, each member's own; all of them if there are fewer. A smaller last batch of an
            epoch is left out.
        max_epochs: Passes over the pixels at most.
        first_counted_epoch: Counted from 0. From it on the batches count whose loss is not below the member's
            smallest one from there on.
        patience: A member stops once so many such batches in a row are exceeded; its last weights are kept.
        init_std: Weights start from a normal of this deviation, biases at 0.
        min_pixels: A class with fewer pixels in an image is left out of that image.
    """

    standardize: bool = False
    learning_rate: float = 1e-3
    batch_size: int = 64
    max_epochs: int = 100
    first_counted_epoch: int = 4
    patience: int = 50
    init_std: float = 0.02
    min_pixels: int = 20

    heads: ClassVar[tuple[str, ...]] = ("pixel_ensemble",)

    def fits(self, head: type[Head]) -> bool:
        """Ensembles of classifiers of pixels."""
        return issubclass(head, PixelEnsembleHead)

    def describe(self) -> dict[str, Any]:
        """Every field as plain values for JSON; `changed` lists those that are not the paper's."""
        fields = asdict(self)
        return {**fields, "changed": [k for k, v in fields.items() if v != getattr(DDPM_SEG, k)]}

    def __post_init__(self) -> None:
        """Refuse values that could not act."""
        if self.standardize:
            raise ValueError("Features of pixels enter as they come, as in the paper; leave standardize=False.")
        for name in ("batch_size", "max_epochs", "patience", "min_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: batch norm has no variance of one pixel.")


DDPM_SEG = PixelProtocol(
    "ddpm-seg",
    source="DDPM-Seg (arXiv 2112.03126), train_interpreter.py of yandex-research/ddpm-segmentation. The order of the "
    "pixels and the first weights are drawn by seed and member here, by the process's random state there.",
)


@dataclass(frozen=True)
class PixelSet:
    """Pixels to learn from.

    Attributes:
        maps: Features of the images.
        places: `(N, 3)` int64: number of the image, row and column of the pixel.
        labels: `(N,)` int64 class ids.
    """

    maps: SampledMaps
    places: Tensor
    labels: Tensor

    def features(self, at: Tensor) -> Tensor:
        """Of these pixels, `(n, L)` float32."""
        return self.maps.sample(*self.places[at].unbind(1))

    def blocks(self, at: Tensor) -> list[Tensor]:
        """Of these pixels, in the parts of `SampledMaps.blocks`, `(*at.shape, L_g)` float32."""
        return [part.unflatten(0, at.shape) for part in self.maps.blocks(*self.places[at.flatten()].unbind(1))]


def member_order(seed: int, member: int, epoch: int, pixels: int) -> Tensor:
    """The order in which a member sees the pixels in an epoch; depends on nothing else."""
    return torch.randperm(pixels, generator=keyed_generator(seed, "order", member, epoch))


def draw_members(head: PixelEnsembleHead, seed: int, std: float) -> None:
    """New weights, each member's by its own generator: N(0, std), biases 0, batch norms as they begin."""
    with torch.no_grad():
        for module in head.modules():
            if hasattr(module, "running_mean"):
                module.running_mean.zero_()
                module.running_var.fill_(1)
                module.weight.fill_(1)
                module.bias.zero_()
        for member in range(head.config["members"]):
            generator = keyed_generator(seed, "weights", member)
            for layer in [*head.linear, head.last]:
                drawn = torch.empty(layer.weight.shape[1:]).normal_(std=std, generator=generator)
                layer.weight[member].copy_(drawn)
                layer.bias[member].zero_()


@dataclass(frozen=True)
class MemberEnds:
    """How the training of each member ended.

    Attributes:
        steps: Steps that it took.
        losses: Loss of its last step.
    """

    steps: list[int]
    losses: list[float]


def train_members(
    head: PixelEnsembleHead,
    pixels: PixelSet,
    protocol: PixelProtocol = DDPM_SEG,
    seed: int = 0,
    progress_bar: Callable[..., Any] | None = None,
) -> MemberEnds:
    """Train the members of a head in place, from new weights.

    A step is one batched matrix product a layer for all members that still learn; what each of them sees and becomes
    is what it would be alone: no weight, statistic or moment of the optimizer is shared.

    Args:
        head: In float32 or wider, on the device that trains.
        pixels: What to learn from.
        protocol: How.
        seed: Of the first weights and of the order.
        progress_bar: `progress_bar(total=n)` gives an object with `update(k)` and `close()`; it counts epochs.

    Raises:
        ValueError: For fewer than two pixels, and a head in half precision.
        FloatingPointError: If a loss is not finite.
    """
    if len(pixels.labels) < 2:
        raise ValueError(f"{len(pixels.labels)} pixels to learn from; batch norm needs at least 2.")
    if head.last.weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"Members are trained in float32; these are {head.last.weight.dtype}. Cast with .float().")
    draw_members(head, seed, protocol.init_std)
    learning = _Learning(head, pixels, protocol)
    bar = None if progress_bar is None else progress_bar(total=protocol.max_epochs)
    try:
        for epoch in range(protocol.max_epochs):
            learning.epoch(seed, counted=epoch >= protocol.first_counted_epoch, number=epoch)
            if bar is not None:
                bar.update(1)
            if not learning.active:
                break
    finally:
        if bar is not None:
            bar.close()
    learning.keep(range(len(learning.active)))
    head.eval()
    return MemberEnds(learning.steps, learning.losses)


class _Learning:
    """The members that still learn; what has stopped lies in the head."""

    def __init__(self, head: PixelEnsembleHead, pixels: PixelSet, protocol: PixelProtocol) -> None:
        self.head, self.pixels, self.protocol = head, pixels, protocol
        self.active = list(range(head.config["members"]))
        self.steps, self.losses = [0] * len(self.active), [math.nan] * len(self.active)
        self.best = torch.full((len(self.active),), math.inf, dtype=torch.float64)
        self.worse = torch.zeros(len(self.active), dtype=torch.int64)
        self.learner = MemberSteps(head, pixels.maps.columns, protocol.learning_rate)

    def epoch(self, seed: int, *, counted: bool, number: int) -> None:
        """One pass; members leave as they stop."""
        labels, like = self.pixels.labels, self.head.last.weight
        count = len(labels)
        size = min(self.protocol.batch_size, count)
        orders = torch.stack([member_order(seed, member, number, count) for member in self.active])
        for start in range(0, count - size + 1, size):
            at = orders[:, start : start + size]
            blocks = [part.to(like.device, like.dtype) for part in self.pixels.blocks(at)]
            losses = self.learner.step(blocks, labels[at].to(like.device))
            for member in self.active:
                self.steps[member] += 1
            if not counted and start + size <= count - size:
                continue  # nobody asks: no wait for the device
            told = losses.double().cpu()
            self._check(told, number)
            for member, loss in zip(self.active, told.tolist(), strict=True):
                self.losses[member] = loss
            if counted:
                orders = self._stop(told, orders)
                if not self.active:
                    return

    def _check(self, losses: Tensor, number: int) -> None:
        if not bool(losses.isfinite().all()):
            place = int((~losses.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"The loss of member {self.active[place]} is {float(losses[place])} in epoch {number}; check the "
                "features for values that are very large or not finite."
            )

    def _stop(self, losses: Tensor, orders: Tensor) -> Tensor:
        """Count, let those go that are done, and give the orders of the others."""
        better = losses < self.best
        self.best = torch.where(better, losses, self.best)
        self.worse = torch.where(better, 0, self.worse + 1)
        done = (self.worse > self.protocol.patience).tolist()
        if not any(done):
            return orders
        self.keep([place for place, stop in enumerate(done) if stop])
        left = [place for place, stop in enumerate(done) if not stop]
        if left:
            self.learner.take(left)
        self.active = [self.active[place] for place in left]
        self.best, self.worse = self.best[left], self.worse[left]
        return orders[left]

    def keep(self, places: Sequence[int]) -> None:
        """Put members as they are now into the head."""
        self.learner.keep(self.head, places, [self.active[place] for place in places])


__all__ = ["DDPM_SEG", "MemberEnds", "PixelProtocol", "PixelSet", "draw_members", "member_order", "train_members"]
