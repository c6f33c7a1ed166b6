"""The maps that readout heads take: which layers, read how, from tokens where the network has tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture import capture, check_layers
from diffusers_repr.denoiser import Condition, Denoiser, Family
from diffusers_repr.denoiser.family_registry import family_of_or_base
from diffusers_repr.denoiser.layers import list_layers
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.noise import NoiseLevel


def readout_layers(model: nn.Module) -> list[str]:
    """Layers a readout head takes unless told otherwise, in execution order; see `Family.default_layers`.

    Raises:
        TypeError: If `model` is no network, but a `Denoiser` or a pipeline.
        ValueError: If the network has neither up-blocks nor a list of transformer blocks.
    """
    return list(_family(model).default_layers("readout", model).layers)


def depth_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Layers of the strong and of the weak depth head unless told otherwise; see `Family.default_layers`.

    Returns:
        `(strong, weak)`, full module paths.

    Raises:
        TypeError, ValueError: As `readout_layers`.
    """
    family = _family(model)
    strong, weak = (family.default_layers(method, model).layers for method in ("depth_strong", "depth_weak"))
    return list(strong), list(weak)


def _family(model: nn.Module) -> Family:
    if not isinstance(model, nn.Module):
        raise TypeError(f"The network is needed, such as `denoiser.model`; got {type(model).__name__}.")
    return family_of_or_base(model)


def tap_channels(
    denoiser: Denoiser, layers: Sequence[str], image_size: int | tuple[int, int] | None = None
) -> list[int]:
    """Channels of the maps that layers give; no weight is touched.

    Args:
        denoiser: Of any family.
        layers: Full module paths.
        image_size: As in `list_layers`.

    Raises:
        ValueError: For layers that do not exist or give no map and no image tokens.
    """
    require_images(denoiser, "Dense heads")
    check_layers(denoiser.model, layers)
    table = {layer.path: layer.channels for layer in list_layers(denoiser, image_size, detail="all")}
    silent = [path for path in layers if path not in table]
    if silent:
        raise ValueError(f"Layers {silent} give no map; `list_layers(denoiser, detail='all')` shows those that do.")
    return [table[path] for path in layers]


@torch.no_grad()
def read_features(
    denoiser: Denoiser,
    x_t: Tensor,
    level: NoiseLevel | float | Tensor,
    condition: Condition | Mapping[str, Any] | None,
    layers: Sequence[str],
) -> dict[str, Tensor]:
    """Maps of named layers, without gradient; the network runs in eval mode and stops after the last layer.

    Args:
        denoiser: Of any family.
        x_t: `alpha x_0 + sigma eps`, `(B, C, h, w)`: what the network takes.
        level: Noise level, one for all or one per sample; a bare number is a training timestep.
        condition: From `denoiser.condition(...)`, network inputs by name, or None for the default condition.
        layers: Full module paths.

    Returns:
        Layer path -> map `(B, C_l, h_l, w_l)` in the network's dtype, in the order of `layers`.
    """
    require_images(denoiser, "Dense heads")
    size = (x_t.shape[2], x_t.shape[3])
    with denoiser.evaluating(), capture(denoiser.model, layers) as tape:
        denoiser.predict(x_t, level, condition)
    return {path: denoiser.feature_map(path, tape[path], size).as_map() for path in layers}


__all__ = ["depth_layers", "read_features", "readout_layers", "tap_channels"]
