"""What checkpoints of iREPA, SRA and REPA-E hold besides a network with the names of REPA: taken apart."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diffusers_repr.models.checkpoint import check_weights, some_of

_PROJECTOR = re.compile(r"projectors\.(\d{1,3})\.projection_layer\.(.+)")  # iREPA
_HEAD = {"linear1": "0", "linear2": "2"}  # SRA's ap_head -> the layers of a sequence
_COUNT = "bn.num_batches_tracked"


@dataclass(frozen=True)
class RelativeParts:
    """What is beside the network.

    Attributes:
        projectors: State dict of each projector of iREPA: the layers `0`, `2` and `4` of a sequence, or `weight` and
            `bias` of one linear layer or convolution.
        self_head: State dict of the projector of SRA, the layers `0` and `2` of a sequence; None for the others.
        latent_mean: `(C,)`, of the raw latents that REPA-E normalises; None for the others.
        latent_var: `(C,)`, their variance.
    """

    projectors: list[dict[str, Tensor]] = field(default_factory=list)
    self_head: dict[str, Tensor] | None = None
    latent_mean: Tensor | None = None
    latent_var: Tensor | None = None


def split_relatives(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], RelativeParts]:
    """A checkpoint's weights by the names of REPA's code, and what iREPA, SRA or REPA-E added.

    Args:
        weights: State dict.

    Raises:
        ValueError: For a part that is not whole, or of other shapes.

    Example:
        >>> import torch
        >>> own, parts = split_relatives({"x": torch.ones(1), "bn.running_mean": torch.zeros(2),
        ...     "bn.running_var": torch.ones(2), "bn.num_batches_tracked": torch.tensor(3)})
        >>> list(own), parts.latent_var.tolist()
        (['x'], [1.0, 1.0])
    """
    taken = {key: value for key, value in weights.items() if key.startswith(("ap_head.", "bn."))}
    matches = {key: match[1] for key in weights if (match := _PROJECTOR.fullmatch(key))}
    idle = {number for key, number in matches.items() if not weights[key].numel()}  # a baseline's gives no channel
    taken |= {key: weights[key] for key, number in matches.items() if number not in idle}
    own = {key: value for key, value in weights.items() if key not in taken and key not in matches}
    taken.pop(_COUNT, None)
    check_weights(taken, {})
    mean, var = _statistics({key: value for key, value in taken.items() if key.startswith("bn.")})
    return own, RelativeParts(_projectors(taken), _self_head(taken), mean, var)


def _projectors(taken: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = {}
    for key, value in taken.items():
        if match := _PROJECTOR.fullmatch(key):
            found.setdefault(int(match[1]), {})[match[2]] = value
    mlp = {f"{layer}.{end}" for layer in (0, 2, 4) for end in ("weight", "bias")}
    for number, part in found.items():
        single = set(part) == {"weight", "bias"} and part["weight"].ndim in (2, 4)
        if not single and (set(part) != mlp or any(part[f"{at}.weight"].ndim != 2 for at in (0, 2, 4))):
            raise ValueError(
                f"projectors.{number} has {some_of(sorted(part))}; a projector of iREPA has {some_of(sorted(mlp))}, "
                "or weight and bias of one linear layer or convolution."
            )
    return [found[number] for number in sorted(found)]


def _self_head(taken: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    names = {f"ap_head.{old}.{end}": f"{new}.{end}" for old, new in _HEAD.items() for end in ("weight", "bias")}
    there = {key: value for key, value in taken.items() if key.startswith("ap_head.")}
    if not there:
        return None
    if there.keys() != names.keys() or any(there[f"ap_head.{layer}.weight"].ndim != 2 for layer in _HEAD):
        raise ValueError(f"ap_head has {some_of(sorted(there))}; that of SRA has {some_of(sorted(names))}.")
    return {new: there[old] for old, new in names.items()}


def _statistics(there: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    if not there:
        return None, None
    names = ("bn.running_mean", "bn.running_var")
    if set(there) != set(names):
        raise ValueError(f"bn has {some_of(sorted(there))}; the one of REPA-E has {some_of(names)} and no weights.")
    mean, var = (there[name] for name in names)
    if mean.ndim != 1 or mean.shape != var.shape or not bool((var > 0).all()):
        raise ValueError(
            f"bn.running_mean {tuple(mean.shape)} and bn.running_var {tuple(var.shape)} must be one number a channel "
            "of the latents, variances above 0."
        )
    return mean, var


__all__ = ["RelativeParts", "split_relatives"]
