"""The alignment loss of REPA: cosine between projected hidden states and the features of frozen encoders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.denoiser import FeatureMap
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.heads.projector import Projector, ProjectorKind
from diffusers_repr.objectives.cosine import mean_cosine
from diffusers_repr.objectives.irepa import standardize_spatially
from diffusers_repr.objectives.matching import (
    MatchGrid,
    check_grids,
    check_mode,
    interpolate_tokens,
    pool_tokens,
    with_grid,
)
from diffusers_repr.objectives.saved_heads import encoder_mark
from diffusers_repr.objectives.terms import AuxiliaryLoss, Step, full_precision, widen

if TYPE_CHECKING:
    from diffusers_repr.objectives.repa import REPAObjective


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


class AlignmentTerm(AuxiliaryLoss):
    """Alignment of one layer with every encoder of the objective; the losses of the encoders are averaged.

    Args:
        layer: Path of the layer.
        weight: lambda; 0.5 in REPA, 1 in iREPA.
        match_grid: What to do where the grids differ; None refuses.
        projector_dim: Hidden width of the projectors.
        projector_kind: `mlp` (REPA) or `conv` (iREPA).
        projector_kernel: Side of the convolution.
        spatial_norm: gamma of iREPA's standardisation of the targets over the tokens; None: none.
        stop_step: Step after which the term ends (HASTE).
    """

    def __init__(
        self,
        layer: str,
        weight: float = 0.5,
        match_grid: MatchGrid | None = None,
        projector_dim: int = 2048,
        projector_kind: ProjectorKind = "mlp",
        projector_kernel: int = 3,
        spatial_norm: float | None = None,
        stop_step: int | None = None,
    ) -> None:
        super().__init__("alignment", weight, stop_step)
        check_mode(match_grid)
        self.layer, self.layers = layer, (layer,)
        self.match_grid, self.spatial_norm = match_grid, spatial_norm
        self.projector_settings: dict[str, Any] = {
            "hidden_dim": projector_dim,
            "kind": projector_kind,
            "kernel_size": projector_kernel,
        }
        self.projectors = nn.ModuleList()
        self.names: tuple[str, ...] = ()
        self.encoders: dict[str, Any] = {}

    def attach(self, objective: REPAObjective) -> None:
        """Check the grids, resize the encoders' input where asked for, and make a projector for each encoder."""
        place = objective.place(self.layer)
        size = objective.denoiser.image_size
        for name, encoder in list(objective.encoders.items()):
            if self.match_grid == "resize_image" and encoder.grid_for(size) != place.grid:
                encoder = objective.encoders[name] = with_grid(encoder, place.grid, size, self.layer)
            check_grids(place.grid, encoder.grid_for(size), self.match_grid, self.layer, name)
        self.names = tuple(objective.encoders)
        self.encoders = objective.encoders
        if len(self.head_modules()) < len(self.names):
            raise ValueError(f"The encoders' names {list(self.names)} are one as folders; pass {{name: encoder}}.")
        self.projectors.extend(
            Projector(place.channels, encoder.dim, **self.projector_settings)
            for encoder in objective.encoders.values()
        )

    def forward(self, step: Step) -> Tensor:
        """Mean over encoders, samples and tokens."""
        losses = []
        for name, projector in zip(self.names, self.projectors, strict=True):
            student, target = self.matched(step.layers[self.layer], step.teachers.tokens(name), name)
            dtype = floating_dtype(projector)  # a network in half precision, without autocast
            projected = projector(student.tokens().to(dtype), student.grid)
            if (token := student.class_token()) is not None:
                own = projector(token.to(dtype)[:, None], (1, 1))
                projected = torch.cat([projected, own], dim=1)
                target = torch.cat([target, widen(step.teachers.global_features(name))[:, None]], dim=1)
            losses.append(alignment_loss(projected, target))
        return torch.stack(losses).mean()

    def matched(self, student: FeatureMap, teacher: FeatureMap, name: str) -> tuple[FeatureMap, Tensor]:
        """Both on one grid: the layer's tokens, and the encoder's as they are to be met."""
        check_grids(student.grid, teacher.grid, self.match_grid, self.layer, name)
        if self.match_grid == "pool_student":
            student = pool_tokens(student, teacher.grid)
        elif self.match_grid == "interpolate_teacher":
            teacher = interpolate_tokens(teacher, student.grid)
        target = widen(teacher.tokens())
        if self.spatial_norm is not None:
            target = standardize_spatially(target, self.spatial_norm)
        return student, target

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
            "projector": dict(self.projector_settings),
            "spatial_norm": self.spatial_norm,
        }


__all__ = ["AlignmentTerm", "alignment_loss"]
