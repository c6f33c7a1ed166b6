"""`ReadoutGuidance`: samples whose readouts by a trained head are near a target, a reference or moved points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.guidance.base import GradientRequest, Guidance, widened
from diffusers_repr.guidance.energy import EnergyTerm, check_update, conditional_inputs
from diffusers_repr.guidance.readout import checks as readout_checks
from diffusers_repr.guidance.readout.head_reading import check_head, features_of, read_head, seen_levels
from diffusers_repr.guidance.readout.losses import (
    Box,
    Point,
    appearance_loss,
    drag_loss,
    resize_target,
    spatial_loss,
)
from diffusers_repr.heads import MapHead
from diffusers_repr.noise import add_noise

_NEEDS = {
    "spatial": ("target",),
    "appearance": ("reference or reference_row",),
    "correspondence": ("reference or reference_row", "points"),
}
_TAKES = {
    "spatial": {"target", "mask"},
    "appearance": {"reference", "reference_row", "mask", "boxes", "pooled"},
    "correspondence": {"reference", "reference_row", "points"},
}


@dataclass(frozen=True, eq=False)
class ReadoutGuidance(Guidance):
    """Readout Guidance (Luo et al. 2024, arXiv 2312.02150): the latents step against the gradient of a readout's loss.

    By the kind of the head (r: readout of a sample; (m, M): range of its latents; (a, b): range of the labels):

    - `spatial` (edges, depth, pose; also a `DepthHead`): `mean (r - target)^2 ((M - m) / (b - a))^2`;
    - `appearance`: `mean (1 - cos(r, r_reference)) (M - m)^2`;
    - `correspondence` (drag): `-1/2 mean S[p1, p2] + 1/2 mean S[p1, p1]`, `S[p, q] = (cos(r_reference[p], r[q]) + 1)
      / 2`: what the reference has at p1 is brought to p2.

    The paper's code sums the losses of the conditional and the null rows; here it is that of the conditional rows, in
    one lane. A sign step does not depend on the size of the loss. The head is told the timestep of the level (that
    code, 999 - t). Several of them are steps after one another, but with `update="eps"` sums.

    Attributes:
        head: A `ReadoutHead`, or another head on maps. Frozen and in eval mode meanwhile; features come to its device.
        target: Of a spatial head: `(H, W)`, `(C, H, W)` or `(B, C, H, W)` in the range of its labels; any size,
            resized to the readout, but of about the samples' aspect ratio.
        scale: Size of a step; 0.02 is the paper's rate. With `update="eps"` the weight of the energy.
        update: `latent_sign`; `latent_adam`, the first step of a fresh Adam (the paper's); `eps`, classifier guidance
            with this energy: no second pass, another algorithm.
        interval: As of every guidance; None is the head's `level_range`. The paper acts in the first half of the
            steps: `(500, 999)` for evenly spaced steps of 1000.
        mask: Weights of places, `(H, W)` or `(B, H, W)` in [0, 1], of a size as the target's.
        rescale: False leaves the factors with M - m (and b - a) out.
        reference: Clean x_0 `(C, h, w)` or `(B, C, h, w)`, by `denoiser.encode(image)`: noised to each level with
            noise of its own and read under the samples' conditions, one more lane without gradient that stops after
            the last layer. (The paper inverts a real image by DDIM.)
        reference_row: A sample of the batch to take as the reference; it is not guided itself. The paper's way for
            generated images, where all start from the same noise: `generator=[...]` of equal seeds.
        points: Of a correspondence head: pairs (p1, p2), each (y, x) in pixels of the readout.
        boxes: Of an appearance head: (reference's, samples'), each (top, left, bottom, right) in pixels of the
            readout; only what is inside is compared.
        pooled: Of an appearance head: compare means over the map instead of places.
        seed: Of the reference's noise, the same at every level.
        checkpoint: Recompute activations in the backward pass.

    Raises:
        TypeError: If `head` is no head on maps.
        ValueError: For what its kind does not take or lacks, and values out of range.

    Example:
        >>> from diffusers_repr.heads import ReadoutHead
        >>> small = {"width": 8, "bottleneck": 4, "output_widths": (4, 4), "time_width": 8}
        >>> head = ReadoutHead(["up_blocks.0.resnets.0.conv2"], [16], **small)
        >>> ReadoutGuidance(head, torch.zeros(16, 24), interval=(500, 999)).update
        'latent_sign'
    """

    head: MapHead = field(repr=False)
    target: Any = field(default=None, repr=False)
    scale: float = field(default=2e-2, kw_only=True)
    update: str = field(default="latent_sign", kw_only=True)
    mask: Any = field(default=None, repr=False, kw_only=True)
    rescale: bool = field(default=True, kw_only=True)
    reference: Tensor | None = field(default=None, repr=False, kw_only=True)
    reference_row: int | None = field(default=None, kw_only=True)
    points: Sequence[tuple[Point, Point]] | None = field(default=None, kw_only=True)
    boxes: tuple[Box, Box] | None = field(default=None, kw_only=True)
    pooled: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    checkpoint: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_head("ReadoutGuidance", self.head)
        check_update(self.update)
        self._check_fields()
        changes = {
            "target": None if self.target is None else readout_checks.target(self.target, self.head),
            "mask": None if self.mask is None else readout_checks.mask(self.mask),
            "reference": None if self.reference is None else readout_checks.reference(self.reference),
            "points": None if self.points is None else readout_checks.points(self.points),
            "boxes": None if self.boxes is None else readout_checks.boxes(self.boxes),
        }
        for name, value in changes.items():
            object.__setattr__(self, name, value)
        if self.reference_row is not None:
            readout_checks.row(self.reference_row)

    def bind(self, denoiser: Denoiser) -> ReadoutTerm:
        """Ready for a model.

        Raises:
            ValueError: For a head of another base, and checkpointing that the model lacks.
        """
        return ReadoutTerm(self, denoiser)

    @property
    def kind(self) -> str:
        """`spatial`, `appearance` or `correspondence`."""
        return str(self.head.config.get("kind", "spatial"))

    def _check_fields(self) -> None:
        names = ("target", "reference", "reference_row", "points", "boxes", "mask")
        given = {name for name in names if getattr(self, name) is not None} | ({"pooled"} if self.pooled else set())
        extra = sorted(given - _TAKES[self.kind])
        if extra:
            raise ValueError(f"{self._called} takes no {', '.join(extra)}; it takes {_listed(_TAKES[self.kind])}.")
        for need in _NEEDS[self.kind]:
            count = len(given & set(need.split(" or ")))
            if not count:
                raise ValueError(f"{self._called} needs {need}.")
            if count > 1:
                raise ValueError(f"{self._called} needs {need}, not both.")
        if self.mask is not None and (self.boxes is not None or self.pooled):
            raise ValueError("mask weighs places; give it without boxes and pooled.")

    @property
    def _called(self) -> str:
        article = "an" if self.kind == "appearance" else "a"
        return f"ReadoutGuidance with {article} {self.kind} {type(self.head).__name__}"


class ReadoutTerm(EnergyTerm):
    """The loss of a readout; with `reference`, a pass of its own that reads the reference at the same level."""

    config: ReadoutGuidance

    def __init__(self, config: ReadoutGuidance, denoiser: Denoiser) -> None:
        head: Any = config.head
        head.check_base(denoiser)
        self.layers = tuple(head.config["layers"])
        request = GradientRequest(
            self._loss, self.layers, update=config.update, checkpoint=config.checkpoint, modules=(head,)
        )
        interval = config.interval or seen_levels(denoiser.schedule, head)
        super().__init__(config.replace(interval=interval), denoiser, request)
        self._read: Tensor | None = None  # readout of the reference at the level of the call

    def prepare(self, call: NetworkCall, forward: Callable[[dict[str, Any]], Any]) -> None:
        """Read the reference, noised to the level of the call."""
        if self.config.reference is None:
            return
        x = self._noised(self.config.reference, call)
        inputs = conditional_inputs(self.denoiser, call, x)
        head: Any = self.config.head
        with torch.no_grad(), eval_mode(head):
            features = features_of(self.denoiser.model, self.layers, lambda: forward(inputs))
            maps = {
                path: self.denoiser.feature_map(path, value, call.size).as_map() for path, value in features.items()
            }
            self._read = read_head(head, maps, call, widened(x))

    def _noised(self, reference: Tensor, call: NetworkCall) -> Tensor:
        like = call.x[call.batch.cond]
        if len(reference) not in (1, len(like)) or reference.shape[1:] != like.shape[1:]:
            raise ValueError(
                f"reference is {tuple(reference.shape)}; the samples' x_0 is {tuple(like.shape)}. Give one for all "
                "samples, or one each, of their size; images become x_0 by denoiser.encode(images)."
            )
        generator = torch.Generator().manual_seed(self.config.seed)
        noise = torch.randn(1, *like.shape[1:], generator=generator)
        x0 = widened(reference.to(like.device)).expand(like.shape)
        return add_noise(x0, call.level, noise.to(x0).expand(like.shape)).to(like.dtype)

    def _loss(self, features: Mapping[str, Tensor], x0: Tensor | None, call: NetworkCall, x: Tensor) -> Tensor:
        config = self.config
        read = read_head(config.head, features, call, x)
        if config.kind == "spatial":
            target = resize_target(_placed("target", config.target, read).to(x), _size(read))
            return spatial_loss(
                read, target, x, config.head.range, rescale=config.rescale, weights=self._weights(read)
            )
        row = config.reference_row
        reference = self._read if row is None else self._row(read, row)
        assert reference is not None
        if config.kind == "correspondence":
            loss = drag_loss(read, reference, config.points or ())
        else:
            loss = appearance_loss(
                read,
                reference,
                x,
                rescale=config.rescale,
                weights=self._weights(read),
                boxes=config.boxes,
                pooled=config.pooled,
            )
        if row is None:
            return loss
        guided = torch.arange(len(read), device=loss.device) != row
        return loss * guided  # zero, exactly: what rounding leaves would be a whole sign step

    def _weights(self, read: Tensor) -> Tensor | None:
        if self.config.mask is None:
            return None
        return resize_target(_placed("mask", self.config.mask, read).to(read), _size(read))

    @staticmethod
    def _row(read: Tensor, row: int) -> Tensor:
        if len(read) < 2 or row >= len(read):
            raise ValueError(
                f"reference_row={row} of a batch of {len(read)}: the batch must hold the reference and at least one "
                "sample to guide."
            )
        return read[row : row + 1].detach().expand_as(read)


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _size(read: Tensor) -> tuple[int, int]:
    return read.shape[2], read.shape[3]


def _placed(name: str, value: Tensor, read: Tensor) -> Tensor:
    """What is one for all samples or one each, and of about their shape."""
    if len(value) not in (1, len(read)):
        raise ValueError(f"{name} has {len(value)} rows for {len(read)} samples; give one for all, or one each.")
    (height, width), (own, across) = _size(value), _size(read)
    if not 0.8 <= height * across / (width * own) <= 1.25:  # beyond what rounding to whole cells does
        raise ValueError(
            f"{name} is {height} x {width} (H x W), the readout of these samples {own} x {across}: it would be "
            "squeezed. Crop or pad it to their shape, or sample images of its shape (height=, width=)."
        )
    return value
