"""The first blocks of a `SiTTransformer2DModel` at one timestep as a plain vision transformer of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.models.sit import SiTTransformer2DModel
from diffusers_repr.models.sit_blocks import SiTBlock, grid_positions

# A layer of a block by what it is -> its names in the versions of transformers.
_LAYERS = {
    "query": ("attention.q_proj", "attention.attention.query"),
    "key": ("attention.k_proj", "attention.attention.key"),
    "value": ("attention.v_proj", "attention.attention.value"),
    "out": ("attention.o_proj", "attention.output.dense"),
    "up": ("mlp.fc1", "intermediate.dense"),
    "down": ("mlp.fc2", "output.dense"),
    "norm1": ("layernorm_before",),
    "norm2": ("layernorm_after",),
}
_BLOCKS = ("layers", "encoder.layer")


@torch.no_grad()
def plain_vit(network: SiTTransformer2DModel, num_layers: int, timestep: float) -> Any:
    """An `IJepaModel`, a ViT without a class token, whose last block gives what block `num_layers - 1` gives.

    At one timestep the condition is a constant: scale and shift of an adaptive norm are then weight and bias of a
    plain one, and a gate is a factor of the layer before it. So nothing is approximated. The norm behind the last
    block, which the network has not, has no weights.

    Args:
        network: Without classes and conditions, of square images.
        num_layers: Blocks that are taken, from the first.
        timestep: What the network is told.

    Raises:
        ValueError: For a network with conditions, with norms of queries and keys, or of images that are not square.
    """
    from transformers import IJepaConfig, IJepaModel

    config = network.config
    size = config["sample_size"]
    if not isinstance(size, int):
        if len(set(size)) != 1:
            raise ValueError(f"Vision transformers of transformers are of square images; this network's are {size}.")
        size = size[0]
    if config["num_classes"] or config["condition_dim"] or config["qk_norm"]:
        raise ValueError("A network with classes, a vector condition or qk_norm is no plain vision transformer.")
    if not 1 <= num_layers <= len(network.blocks):
        raise ValueError(f"num_layers={num_layers}; the network has blocks 1 to {len(network.blocks)}.")
    model = IJepaModel(
        IJepaConfig(
            image_size=size,
            patch_size=config["patch_size"],
            num_channels=config["in_channels"],
            hidden_size=config["hidden_size"],
            num_hidden_layers=num_layers,
            num_attention_heads=config["num_attention_heads"],
            intermediate_size=int(config["hidden_size"] * config["mlp_ratio"]),
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )
    temb = network._embed_time(torch.tensor([float(timestep)]), network.patch_embed.weight[:1])
    side = size // config["patch_size"]
    weights: dict[str, Tensor] = {
        "embeddings.patch_embeddings.projection.weight": network.patch_embed.weight,
        "embeddings.position_embeddings": grid_positions(side, side, config["hidden_size"]),
        "layernorm.weight": torch.ones(config["hidden_size"]),
        "layernorm.bias": torch.zeros(config["hidden_size"]),
    }
    if network.patch_embed.bias is not None:
        weights["embeddings.patch_embeddings.projection.bias"] = network.patch_embed.bias
    names = model.state_dict().keys()
    for number in range(num_layers):
        for kind, (weight, bias) in _constant(network.blocks[number], temb).items():  # type: ignore[arg-type]
            path = _path(names, number, kind)
            weights |= {f"{path}.weight": weight, f"{path}.bias": bias}
    model.load_state_dict({name: value.detach().cpu().float() for name, value in weights.items()})
    return model.eval()


def _constant(block: SiTBlock, temb: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Weight and bias of a block's layers with a condition `(1, D)` folded in."""
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(torch.nn.functional.silu(temb))[0].chunk(6)
    attn, (up, _, down) = block.attn, block.ff.net
    out: Any = attn.to_out[0]
    linear: dict[str, Any] = {"query": attn.to_q, "key": attn.to_k, "value": attn.to_v, "up": up.proj}
    return {
        "norm1": (1 + scale1, shift1),
        "norm2": (1 + scale2, shift2),
        "out": (gate1[:, None] * out.weight, gate1 * out.bias),
        "down": (gate2[:, None] * down.weight, gate2 * down.bias),
        **{kind: (layer.weight, layer.bias) for kind, layer in linear.items()},
    }


def _path(names: Any, number: int, kind: str) -> str:
    """A layer's path in the version of transformers that is installed."""
    paths = [f"{blocks}.{number}.{layer}" for blocks in _BLOCKS for layer in _LAYERS[kind]]
    return next(path for path in paths if f"{path}.weight" in names)


__all__ = ["plain_vit"]
