"""Distances between what a student and a teacher give: features, attention, relations among images."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.models.gathered import gathered

_EPS = 1e-6


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Where a map is strong: `Q(A) / ||Q(A)||_2` with `Q(A) = vec(sum_c |A_c|^p)` (arXiv 2307.07487, section 3.2).

    It does not change with the order of the channels, nor with a positive factor.

    Args:
        features: `(B, C, h, w)`.
        power: p.

    Returns:
        `(B, h * w)`, each row of length 1 (0 for a map that is 0), float32.
    """
    strength = features.float().abs().pow(power).sum(1).flatten(1)
    return F.normalize(strength, dim=1)


def attention_transfer(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """`||Q(student) - Q(teacher)||_p`, mean over images (DreamTeacher, arXiv 2307.07487, eq. 2).

    Args:
        student: `(B, C, h, w)`.
        teacher: `(B, C', h, w)`; channels need not agree.
        power: p, of the maps and of the norm.

    Example:
        >>> x = torch.randn(2, 3, 4, 4)
        >>> float(attention_transfer(x, 5 * x.flip(1))) < 1e-5
        True
    """
    difference = attention_map(student, power) - attention_map(teacher, power)
    return torch.linalg.vector_norm(difference, power, dim=1).mean()


def attention_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention maps, as RepFusion's code has it; the student is resized.

    Args:
        student: `(B, C, h, w)`.
        teacher: `(B, C', h', w')`.
    """
    return F.mse_loss(attention_map(resized(student, teacher)), attention_map(teacher))


def relational_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of pairwise distances, each set over its mean (RKD, arXiv 1904.05068, eq. 5 to 7).

    The images of all processes are compared.

    Args:
        student: `(B, D)`, B at least 2.
        teacher: `(B, D')`; widths need not agree.
    """
    ours, theirs = (_scaled_distances(_everyone(part)) for part in (student, teacher))
    return F.smooth_l1_loss(ours, theirs)


def relational_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 of the cosines of all angles among triples of images (RKD, arXiv 1904.05068, eq. 8 and 9).

    The images of all processes are compared.

    Args:
        student: `(B, D)`.
        teacher: `(B, D')`; widths need not agree.
    """
    ours, theirs = (_cosines(_everyone(part)) for part in (student, teacher))
    return F.smooth_l1_loss(ours, theirs)


def contrastive(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE: of the teacher's vectors of all images, which is of the same image as the student's?

    Args:
        student: `(B, D)`.
        teacher: `(B, D)`, of the images of this process; those of all processes are compared with.
        temperature: Of the softmax over cosines.
    """
    ours, theirs = (F.normalize(part.float(), dim=1) for part in (student, teacher))
    first = 0
    if _distributed():
        first, theirs = dist.get_rank() * len(ours), gathered(theirs)
    return F.cross_entropy(ours @ theirs.T / temperature, first + torch.arange(len(ours), device=ours.device))


def normalized(features: Tensor, channels_only: bool = False) -> Tensor:
    """Parameter-free layer norm of each image's map, over channels and places or over channels alone; float32.

    Args:
        features: `(B, C, h, w)`.
        channels_only: Norm each place by itself.

    Example:
        >>> out = normalized(3 * torch.randn(2, 4, 5, 5) + 7)
        >>> bool(out.mean((1, 2, 3)).abs().max() < 1e-5)
        True
    """
    x = features.float()
    if channels_only:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=_EPS).movedim(-1, 1)
    return F.layer_norm(x, x.shape[1:], eps=_EPS)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the student's class probabilities with the teacher's, both softened; mean over pixels.

    Args:
        student: Logits `(B, K, ...)`.
        teacher: As `student`.
        temperature: tau, which divides both.
    """
    targets = (teacher.float() / temperature).softmax(1)
    return -(targets * (student.float() / temperature).log_softmax(1)).sum(1).mean()


def resized(student: Tensor, teacher: Tensor) -> Tensor:
    """The student's map `(B, C, h, w)` at the teacher's size, bilinear."""
    if student.shape[2:] == teacher.shape[2:]:
        return student
    return F.interpolate(student, tuple(teacher.shape[2:]), mode="bilinear", align_corners=False)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _everyone(rows: Tensor) -> Tensor:
    """Rows of all processes; the gradient of each is its share of the mean that data-parallel training takes.

    Each process then has the same loss of all rows. Its backward pass adds up what the processes give to a row, and
    the average over processes makes of it the gradient of that loss.
    """
    return gathered(rows.float()) if _distributed() else rows.float()


def _scaled_distances(rows: Tensor) -> Tensor:
    distances = torch.cdist(rows, rows)  # 0 on the diagonal, and with no gradient there
    others = distances[distances > 0]
    return distances / others.mean() if len(others) else distances


def _cosines(rows: Tensor) -> Tensor:
    directions = F.normalize(rows[None] - rows[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


__all__ = [
    "attention_error",
    "attention_map",
    "attention_transfer",
    "contrastive",
    "normalized",
    "relational_angle",
    "relational_distance",
    "resized",
    "soft_cross_entropy",
]
