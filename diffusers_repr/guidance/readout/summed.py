"""`SummedReadoutGuidance`: several readouts as one step on their summed loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import Guidance
from diffusers_repr.guidance.readout.guidance import ReadoutGuidance
from diffusers_repr.guidance.readout.term import ReadoutTerm, latent_update

# Of a `ReadoutGuidance`: what is of the step, and so of the sum.
_OF_THE_STEP = ("scale", "interval", "adaptive", "update", "steps", "checkpoint")


@dataclass(frozen=True, eq=False)
class SummedReadoutGuidance(Guidance):
    """One step of Readout Guidance (Luo et al. 2024, arXiv 2312.02150) on the losses of several heads.

    `loss = sum of weight_k loss_k`, in one pass over the network. The paper's drag is an appearance and a
    correspondence head: `SummedReadoutGuidance([ReadoutGuidance(appearance, reference_row=0),
    ReadoutGuidance(correspondence, reference_row=0, points=points)], published=True)`.

    Attributes:
        parts: `ReadoutGuidance` of each head, with a `weight`; scale, interval and what else is of the step is given
            here instead.
        scale: Size of a step.
        interval: None is what lies in the `level_range` of all heads.
        update: As of `ReadoutGuidance`, and so are the following.
        steps: As there.
        published: As there, of all parts.
        checkpoint: As there.

    Raises:
        TypeError: For parts that are no `ReadoutGuidance`.
        ValueError: For no parts, and parts with settings of the step.

    Example:
        >>> import torch
        >>> from diffusers_repr.heads import ReadoutHead
        >>> small = {"width": 8, "bottleneck": 4, "output_widths": (4, 4), "time_width": 8}
        >>> edges, depth = (ReadoutHead(["up_blocks.0.resnets.0.conv2"], [16], target=t, **small) for t in "ab")
        >>> target = torch.zeros(16, 24)
        >>> SummedReadoutGuidance([ReadoutGuidance(edges, target), ReadoutGuidance(depth, target, weight=0.5)]).update
        'latent_sign'
    """

    parts: Sequence[ReadoutGuidance] = field(kw_only=False)
    scale: float = field(default=2e-2, kw_only=True)
    update: str | None = field(default=None, kw_only=True)
    steps: int = field(default=1, kw_only=True)
    published: bool = field(default=False, kw_only=True)
    checkpoint: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        update = latent_update(self.update, self.steps, published=self.published)
        object.__setattr__(self, "update", update)
        parts = [self.parts] if isinstance(self.parts, ReadoutGuidance) else list(self.parts)
        wrong = [type(part).__name__ for part in parts if not isinstance(part, ReadoutGuidance)]
        if wrong:
            raise TypeError(f"SummedReadoutGuidance sums ReadoutGuidance(...); got {', '.join(wrong)}.")
        if not parts:
            raise ValueError("SummedReadoutGuidance needs at least one ReadoutGuidance.")
        for part in parts:
            self._check(part)
        made = tuple(part.replace(published=self.published) for part in parts)
        object.__setattr__(self, "parts", made)

    def bind(self, denoiser: Denoiser) -> ReadoutTerm:
        """Ready for a model.

        Raises:
            ValueError: For a head of another base, and checkpointing that the model lacks.
        """
        return ReadoutTerm(self, denoiser, self.parts)

    def _check(self, part: ReadoutGuidance) -> None:
        """Refuse what would do nothing."""
        defaults: dict[str, tuple[Any, ...]] = {item.name: (item.default,) for item in dataclasses.fields(part)}
        defaults["update"] = ("latent_sign", latent_update(None, 1, published=part.published))
        given = [name for name in _OF_THE_STEP if getattr(part, name) not in defaults[name]]
        if part.published and not self.published:
            given.append("published")
        if given:
            raise ValueError(
                f"A part of SummedReadoutGuidance has {', '.join(given)}, which the sum decides for all parts: give "
                "it to SummedReadoutGuidance. Of its own a part has head, target, reference, weight and the like."
            )
