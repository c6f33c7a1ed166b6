"""`ReadoutGuidance`: samples whose readouts by a trained head are near a target, a reference or moved points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import Guidance, check_finite
from diffusers_repr.guidance.readout.appearance import AppearanceComparison, Box
from diffusers_repr.guidance.readout.base import Comparison, require_map_head
from diffusers_repr.guidance.readout.drag import DragComparison, Point
from diffusers_repr.guidance.readout.spatial import SpatialComparison
from diffusers_repr.guidance.readout.term import ReadoutTerm, latent_update
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

    The loss is that of the conditional rows, in one lane; a sign step does not depend on its size. Several of these
    are steps after one another, but with `update="eps"` sums; `SummedReadoutGuidance` makes one step on a summed loss.
    `published=True` is the paper's code, to the digit.

    Attributes:
        head: A `ReadoutHead`, or another head on maps. Frozen and in eval mode meanwhile; features come to its device.
        target: Of a spatial head: `(H, W)`, `(C, H, W)` or `(B, C, H, W)` in the range of its labels; any size,
            resized to the readout, but of about the samples' aspect ratio.
        scale: Size of a step; 0.02 is the paper's rate. With `update="eps"` the weight of the energy.
        update: `latent_sign`; `latent_adam`, steps of an Adam that is fresh at each level (the paper's); `eps`,
            classifier guidance with this energy: no second pass, another algorithm. None is `latent_sign`, or
            `latent_adam` with `published`.
        interval: As of every guidance; None is the head's `level_range`. The paper acts in the first half of the
            steps: `(500, 999)` for evenly spaced steps of 1000.
        mask: Weights of places, `(H, W)` or `(B, H, W)` in [0, 1], of a size as the target's.
        rescale: False leaves the factors with M - m (and b - a) out.
        reference: Clean x_0 `(C, h, w)` or `(B, C, h, w)`, by `denoiser.encode(image)`: noised to each level with
            noise of its own and read under the samples' conditions, one more lane without gradient that stops after
            the last layer. (The paper inverts a real image by DDIM.)
        reference_row: A sample of the batch to take as the reference; it is not guided itself. The paper's way for
            generated images, where all start from the same noise: `generator=[...]` of equal seeds. A spatial head
            needs none, and compares with none.
        points: Of a correspondence head: pairs (p1, p2), each (y, x) in pixels of the readout.
        boxes: Of an appearance head: (reference's, samples'), each (top, left, bottom, right) in pixels of the
            readout; only what is inside is compared.
        pooled: Of an appearance head: compare means over the map instead of places.
        seed: Of the reference's noise, the same at every level.
        checkpoint: Recompute activations in the backward pass.
        weight: Factor of its loss (the code's `loss_rescale`), which counts in a sum, or with `update="eps"`.
        steps: At each level, each with a pass of its own (the code's `num_recurrent_steps`).
        published: As the published code computes it, for pipelines that guide in one batch: the loss summed over the
            conditional and the null rows, (m, M) of the whole batch, target and mask resized by nearest values, and
            the timestep t embedded also for heads that were trained with `reversed_time`. That code's fp16 runs take
            an 8-bit Adam, which is left out.
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
    update: str | None = field(default=None, kw_only=True)
    mask: Any = field(default=None, repr=False, kw_only=True)
    rescale: bool = field(default=True, kw_only=True)
    reference: Tensor | None = field(default=None, repr=False, kw_only=True)
    reference_row: int | None = field(default=None, kw_only=True)
    points: Sequence[tuple[Point, Point]] | None = field(default=None, kw_only=True)
    boxes: tuple[Box, Box] | None = field(default=None, kw_only=True)
    pooled: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    checkpoint: bool = field(default=False, kw_only=True)
    weight: float = field(default=1.0, kw_only=True)
    steps: int = field(default=1, kw_only=True)
    published: bool = field(default=False, kw_only=True)
    comparison: Comparison = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_map_head("ReadoutGuidance", self.head)
        check_finite("weight", self.weight)
        object.__setattr__(self, "update", latent_update(self.update, self.steps, published=self.published))
        kind = _COMPARISONS[self.kind]
        self._check_given(kind)
        names = [item.name for item in fields(kind)]
        made = kind(**{name: getattr(self, name) for name in names})
        for name, value in (("comparison", made), *((name, getattr(made, name)) for name in names)):
            object.__setattr__(self, name, value)

    def replace(self, **changes: Any) -> Any:
        """The same settings with some changed; an `update` that nobody chose follows `published`."""
        if self.update == latent_update(None, self.steps, published=self.published):
            changes = {"update": None, **changes}
        return super().replace(**changes)

    def bind(self, denoiser: Denoiser) -> ReadoutTerm:
        """Ready for a model.

        Raises:
            ValueError: For a head of another base, and checkpointing that the model lacks.
        """
        return ReadoutTerm(self, denoiser, [self])

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
