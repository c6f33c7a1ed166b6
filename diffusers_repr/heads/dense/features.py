"""The maps that readout heads take: which layers, read how, from tokens where the network has tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture import capture, check_layers
from diffusers_repr.denoiser import Condition, Denoiser
from diffusers_repr.denoiser.denoiser import require_denoiser
from diffusers_repr.denoiser.layers import list_layers
from diffusers_repr.noise import NoiseLevel

_STACKS = ("transformer_blocks", "single_transformer_blocks", "blocks", "layers")  # in the order in which they run
_STRONG, _WEAK = (2, 4, 5, 6, 7), 6  # decoder blocks of Depth-Aware Guidance, counted from 0


def readout_layers(model: nn.Module) -> list[str]:
    """Layers a readout head takes unless told otherwise, in execution order.

    U-Nets: the residual branch of every up-block's residual block, `up_blocks.i.resnets.j.conv2`, before the shortcut
    is added (Luo et al. 2024, Readout Guidance; 12 maps for Stable Diffusion 1). Transformers: every block of the
    second half (no published choice).

    Raises:
        TypeError: If `model` is no network, but a `Denoiser` or a pipeline.
        ValueError: If the network has neither up-blocks nor a list of transformer blocks.
    """
    blocks = _decoder_blocks(model)
    if blocks[0].startswith("up_blocks."):
        return [f"{path}.conv2" for path in blocks]
    return blocks[len(blocks) // 2 :]


def depth_layers(model: nn.Module) -> tuple[list[str], list[str]]:
    """Layers of the strong and of the weak depth head unless told otherwise (Kim et al. 2022, DAG).

    U-Nets: decoder blocks 2, 4, 5, 6, 7 and 6, counted from 0 over `up_blocks.i.resnets.j`; where there are fewer
    than eight, all but the first, and the one before the last. Transformers: as `readout_layers`, and its middle one.

    Returns:
        `(strong, weak)`, full module paths.

    Raises:
        TypeError, ValueError: As `readout_layers`.
    """
    blocks = _decoder_blocks(model)
    if not blocks[0].startswith("up_blocks."):
        strong = blocks[len(blocks) // 2 :]
        return strong, [strong[len(strong) // 2]]
    if len(blocks) > max(_STRONG):
        return [blocks[at] for at in _STRONG], [blocks[_WEAK]]
    return blocks[1:] or blocks, [blocks[-2] if len(blocks) > 1 else blocks[-1]]


def _decoder_blocks(model: nn.Module) -> list[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"The network is needed, such as `denoiser.model`; got {type(model).__name__}.")
    model = getattr(model, "_orig_mod", model)
    found = [
        f"up_blocks.{i}.resnets.{j}"
        for i, stage in enumerate(getattr(model, "up_blocks", ()))
        for j, block in enumerate(getattr(stage, "resnets", ()))
        if hasattr(block, "conv2")
    ]
    if not found:
        found = [f"{name}.{i}" for name in _STACKS for i in range(len(getattr(model, name, ())))]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has neither up_blocks with residual blocks nor a list of transformer blocks "
            f"({', '.join(_STACKS)}); name the layers. `list_layers(denoiser)` shows them."
        )
    return found


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
    require_denoiser(denoiser)
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
    require_denoiser(denoiser)
    size = (x_t.shape[2], x_t.shape[3])
    with denoiser.evaluating(), capture(denoiser.model, layers) as tape:
        denoiser.predict(x_t, level, condition)
    return {path: denoiser.feature_map(path, tape[path], size).as_map() for path in layers}


__all__ = ["depth_layers", "read_features", "readout_layers", "tap_channels"]
