"""The direction in a space of codes that leads to an attribute, by a linear probe."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_repr.heads.fitting.logistic import fit_logistic_path


def code_direction(codes: Tensor, labels: Tensor, l2: float = 1e-2) -> Tensor:
    """`sqrt(D) std w / |w|`: w are the weights of a logistic probe on standardised codes (DiffAE, section 4.3).

    A code moved by `s` times it is moved by `s sqrt(D)` standard deviations along the probe's normal; DiffAE moves by
    about 0.3.

    Args:
        codes: `(N, D)`, of images with and without the attribute.
        labels: `(N,)`, boolean or 0 and 1: whether it is there.
        l2: Penalty of the probe's weights.

    Returns:
        `(D,)`, float32.

    Raises:
        ValueError: For codes and labels that do not fit, or where all or none have the attribute.
    """
    marks = torch.as_tensor(labels).long().cpu()
    if codes.ndim != 2 or marks.shape != (len(codes),):
        raise ValueError(f"Codes are (N, D), with a label each (N,); got {tuple(codes.shape)}, {tuple(marks.shape)}.")
    if marks.unique().tolist() != [0, 1]:
        raise ValueError(
            f"A direction needs codes with the attribute (1) and without (0); got labels {marks.unique().tolist()}. "
            "Of a class: labels == class_id."
        )
    wide = codes.detach().double().cpu()
    mean, std = wide.mean(0), wide.std(0, correction=0)
    std = torch.where(std > 1e-6 * wide.abs().amax(0).clamp(min=1e-12), std, torch.ones_like(std))
    weight = fit_logistic_path((wide - mean) / std, marks, 2, [l2])[0].weight
    normal = weight[1] - weight[0]
    return (len(std) ** 0.5 * std * normal / normal.norm()).float()


__all__ = ["code_direction"]
