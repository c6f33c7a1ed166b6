"""`ReadoutGuidance`: samples whose readouts by a trained head are near a target, a reference or moved points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import GradientRequest, Guidance
from diffusers_repr.guidance.energy import EnergyTerm, check_update
from diffusers_repr.guidance.readout.appearance import AppearanceComparison, Box
from diffusers_repr.guidance.readout.base import Comparison, head_readout, require_map_head, seen_levels
from diffusers_repr.guidance.readout.drag import DragComparison, Point
from diffusers_repr.guidance.readout.reference import read_reference
from diffusers_repr.guidance.readout.spatial import SpatialComparison
from diffusers_repr.heads import MapHead

_COMPARISONS: dict[str, type[Comparison]] = {
    "spatial": SpatialComparison,
    "appearance": AppearanceComparison,
    "correspondence": DragComparison,
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
    one lane. A sign step does not depend on the size of the loss. The head gets the timestep of the level (in that
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
        comparison: What readouts are compared with, by the kind of the head; made of the above.

    Raises:
        TypeError: If `head` is no head on maps.
        ValueError: For what its kind does not take or lacks, and values out of range.

    Example:
        >>> import torch
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
    comparison: Comparison = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_map_head("ReadoutGuidance", self.head)
        check_update(self.update)
        kind = _COMPARISONS[self.kind]
        self._check_given(kind)
        names = [item.name for item in fields(kind)]
        made = kind(**{name: getattr(self, name) for name in names})
        for name, value in (("comparison", made), *((name, getattr(made, name)) for name in names)):
            object.__setattr__(self, name, value)

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

    def _check_given(self, kind: type[Comparison]) -> None:
        names = ("target", "reference", "reference_row", "points", "boxes", "mask")
        given = {name for name in names if getattr(self, name) is not None} | ({"pooled"} if self.pooled else set())
        extra, taken = sorted(given - kind.takes()), ", ".join(sorted(kind.takes()))
        if extra:
            raise ValueError(f"{self._called} takes no {', '.join(extra)}; it takes {taken}.")
        for need in kind.needs:
            count = len(given & set(need.split(" or ")))
            if not count:
                raise ValueError(f"{self._called} needs {need}.")
            if count > 1:
                raise ValueError(f"{self._called} needs {need}, not both.")

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
        request = GradientRequest(
            self._loss,
            tuple(head.config["layers"]),
            update=config.update,
            checkpoint=config.checkpoint,
            modules=(head,),
        )
        interval = config.interval or seen_levels(denoiser.schedule, head)
        super().__init__(config.replace(interval=interval), denoiser, request)
        self._reference: Tensor | None = None  # its readout at the level of the call

    def prepare(self, call: NetworkCall, forward: Callable[[dict[str, Any]], Any]) -> None:
        """Read the reference, noised to the level of the call."""
        config = self.config
        if config.reference is not None:
            self._reference = read_reference(config.reference, config.head, self.denoiser, call, config.seed, forward)

    def _loss(self, features: Mapping[str, Tensor], x0: Tensor | None, call: NetworkCall, x: Tensor) -> Tensor:
        return self.config.comparison.loss(head_readout(self.config.head, features, call, x), self._reference, x)
