"""The alignment loss of REPA: cosine between projected hidden states and the features of frozen encoders."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.denoiser import FeatureMap
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.heads.projector import Projector
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, LossHost, Observation, full_precision, widen
from diffusers_repr.objectives.cosine import mean_cosine
from diffusers_repr.objectives.matching import (
    MatchGrid,
    check_grids,
    check_matching,
    interpolate_tokens,
    pool_tokens,
    with_grid,
)
from diffusers_repr.objectives.saved_heads import encoder_mark


def alignment_loss(projected: Tensor, target: Tensor) -> Tensor:
    """`-mean cos(target, projected)` over samples and tokens (Yu et al. 2024, arXiv 2410.06940, eq. 8).

    In float32 or wider, whatever comes in: normalising in half precision overflows.

    Args:
        projected: `(B, N, D)`.
        target: `(B, N, D)`.

    Returns:
        A scalar in [-1, 1]; -1 is the optimum.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> z = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
        >>> round(float(alignment_loss(10 * z, z)), 6)
        -1.0
    """
    if projected.shape != target.shape:
        raise ValueError(f"Projected {tuple(projected.shape)} and target {tuple(target.shape)} must have one shape.")
    with full_precision(projected.device):
        if target.requires_grad:
            return -F.cosine_similarity(widen(target), widen(projected), dim=-1).mean()
        return -mean_cosine(projected, target)


class AlignmentLoss(AuxiliaryLoss):
    """Alignment of one layer with every encoder of the objective; the losses of the encoders are averaged.

    Args:
        layer: Path of the layer, such as `blocks.3`; that of `denoiser.default_layers("repa")` if None. Papers count
            blocks from 1, paths from 0: REPA's encoder depth 8 is `blocks.7`.
        weight: lambda.
        match_grid: Where the token grids of layer and encoder differ: `resize_image` gives the encoder images of
            another size, `pool_student` averages the layer's tokens, `interpolate_teacher` resizes the encoder's
            features. None refuses.
        projector_dim: Hidden width of the projectors.
        stop_step: Optimizer steps after which the loss ends, as HASTE has it; None: never.
    """

    def __init__(
        self,
        layer: str | None = None,
        weight: float = 0.5,
        match_grid: MatchGrid | None = None,
        projector_dim: int = 2048,
        *,
        stop_step: int | None = None,
    ) -> None:
        super().__init__("alignment", weight, stop_step)
        check_matching(match_grid)
        self.chosen, self.match_grid = layer, match_grid
        self.projector: dict[str, Any] = {"hidden_dim": projector_dim, "kind": "mlp", "kernel_size": 3}
        self.projectors = nn.ModuleList()
        self.names: tuple[str, ...] = ()
        self.encoders: dict[str, Any] = {}

    @property
    def layer(self) -> str:
        """Path of the layer."""
        return self.layers[0]

    def attach(self, host: LossHost) -> None:
        """Check the grids, resize the encoders' input where asked for, and make a projector for each encoder.

        Raises:
            ValueError: Without encoders, for grids that differ, or names that are one as folders.
        """
        if not host.encoders:
            raise ValueError("Alignment needs a teacher; pass encoders.")
        self.layers = tuple(host.denoiser.default_layers("repa").layers) if self.chosen is None else (self.chosen,)
        place = host.layer(self.layer)
        size = host.denoiser.image_size
        for name, encoder in list(host.encoders.items()):
            if self.match_grid == "resize_image" and encoder.grid_for(size) != place.grid:
                encoder = host.encoders[name] = with_grid(encoder, place.grid, size, self.layer)
            check_grids(place.grid, encoder.grid_for(size), self.match_grid, self.layer, name)
        self.names = tuple(host.encoders)
        self.encoders = host.encoders
        if len(self.head_modules()) < len(self.names):
            raise ValueError(f"The encoders' names {list(self.names)} are one as folders; pass {{name: encoder}}.")
        self.projectors.extend(
            Projector(place.channels, encoder.dim, **self.projector) for encoder in host.encoders.values()
        )

    def forward(self, seen: Observation) -> Tensor:
        """Mean over encoders, samples and tokens."""
        losses = []
        for name, projector in zip(self.names, self.projectors, strict=True):
            student, target = self.matched(seen.layers[self.layer], seen.teachers.tokens(name), name)
            dtype = floating_dtype(projector)  # a network in half precision, without autocast
            projected = projector(student.tokens().to(dtype), student.grid)
            if (token := student.class_token()) is not None:
                own = projector(token.to(dtype)[:, None], (1, 1))
                projected = torch.cat([projected, own], dim=1)
                target = torch.cat([target, widen(seen.teachers.global_features(name))[:, None]], dim=1)
            losses.append(alignment_loss(projected, target))
        return torch.stack(losses).mean()

    def matched(self, student: FeatureMap, teacher: FeatureMap, name: str) -> tuple[FeatureMap, Tensor]:
        """Both on one grid: the layer's tokens, and the encoder's as they are to be met."""
        check_grids(student.grid, teacher.grid, self.match_grid, self.layer, name)
        if self.match_grid == "pool_student":
            student = pool_tokens(student, teacher.grid)
        elif self.match_grid == "interpolate_teacher":
            teacher = interpolate_tokens(teacher, student.grid)
        return student, self.target(widen(teacher.tokens()))

    def target(self, features: Tensor) -> Tensor:
        """What the projected tokens are drawn to, of an encoder's features `(B, N, D)` on the common grid."""
        return features

    def head_modules(self) -> dict[str, str]:
        """`projector-<encoder>`, with slashes and the like replaced."""
        safe = ["".join(c if c.isalnum() or c in "-_." else "-" for c in name) for name in self.names]
        return {f"projector-{name}": f"projectors.{at}" for at, name in enumerate(safe)}

    def head_config(self, name: str) -> dict[str, Any]:
        """What the encoder was."""
        return {"encoder": encoder_mark(self.encoders[self.names[list(self.head_modules()).index(name)]])}

    def describe(self) -> dict[str, Any]:
        """With the encoders' names."""
        return {
            **super().describe(),
            "encoders": list(self.names),
            "match_grid": self.match_grid,
            "projector": dict(self.projector),
            "spatial_norm": None,
        }


__all__ = ["AlignmentLoss", "alignment_loss"]
