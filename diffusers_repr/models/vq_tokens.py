"""Tokens of a `VQModel`: images to ids, ids or mixtures of them to embeddings, embeddings to images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor


def check_tokenizer(vqvae: Any) -> VQModel:
    """The tokenizer, if it is one.

    Raises:
        TypeError: For another class.
    """
    if not isinstance(vqvae, VQModel):
        raise TypeError(f"The tokenizer is a diffusers VQModel; got {type(vqvae).__name__}.")
    return vqvae


def vocabulary_size(vqvae: VQModel) -> int:
    """V, ids of a tokenizer."""
    return int(vqvae.config["num_vq_embeddings"])


def token_stride(vqvae: VQModel) -> int:
    """Pixels a token, along a side."""
    return 2 ** (len(vqvae.config["block_out_channels"]) - 1)


def check_vocabulary(network: Any, vqvae: Any, name: str = "network") -> None:
    """Refuse a network of tokens that a tokenizer does not give.

    Args:
        network: A `MaskedTokenModel` or `PixelTokenModel`.
        vqvae: The tokenizer.
        name: What the network is called.

    Raises:
        TypeError: For what is no tokenizer.
        ValueError: For another vocabulary, stride or number of channels.
    """
    size, own = vocabulary_size(check_tokenizer(vqvae)), network.config["vocab_size"]
    if own != size:
        raise ValueError(
            f"The {name} knows {own} tokens and the tokenizer gives {size}: it was made for another tokenizer. Load "
            f"the one that lies beside it, or make a new {name} with vocab_size={size}."
        )
    if "patch_size" in network.config:  # of pixels
        stride, channels = token_stride(vqvae), vqvae.config["in_channels"]
        if (network.config["patch_size"], network.config["in_channels"]) != (stride, channels):
            raise ValueError(
                f"The {name} reads patches of {network.config['patch_size']} pixels and {network.config['in_channels']}"
                f" channels; a token of the tokenizer is one of {stride} pixels and {channels} channels."
            )


@torch.no_grad()
def encode_tokens(vqvae: VQModel, pixels: Tensor) -> Tensor:
    """Ids `(B, h, w)`, int64, of images `(B, C, H, W)` in [-1, 1]; outside of any autocast, so that ids are those
    of the tokenizer's own precision.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        latents = vqvae.encode(pixels.to(vqvae.dtype)).latents
        ids = vqvae.quantize(latents)[2][2]
    return ids.view(len(pixels), *latents.shape[2:])


def token_embeddings(vqvae: VQModel, ids: Tensor) -> Tensor:
    """The codes `(..., D)` of ids `(...)`, on their device."""
    embedding = vqvae.quantize.embedding  # whose weights offloading keeps elsewhere until it is called
    where = ids.device if embedding.weight.is_meta else embedding.weight.device
    return embedding(ids.to(where)).to(ids.device)


def mixed_embeddings(vqvae: VQModel, ids: Tensor, mask: Tensor, probabilities: Tensor) -> Tensor:
    """Codes `(B, N, D)`: expected ones where a token is masked, those of the ids elsewhere (ADDP's canvas).

    Args:
        vqvae: The tokenizer.
        ids: `(B, N)`.
        mask: `(B, N)`, boolean.
        probabilities: Of the ids, `(B, N, V)`.
    """
    codes = token_embeddings(vqvae, torch.arange(probabilities.shape[-1], device=ids.device))
    return torch.where(mask[..., None], probabilities.to(codes.dtype) @ codes, codes[ids])


def decode_embeddings(vqvae: VQModel, embeddings: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images `(B, C, H, W)` of codes or mixtures of codes `(B, N, D)`; not clamped.

    Args:
        vqvae: The tokenizer.
        embeddings: As `token_embeddings` and `mixed_embeddings` give them, row by row.
        grid: (h, w) in tokens.
    """
    codes = embeddings.transpose(1, 2).unflatten(2, grid)
    if not vqvae.config["lookup_from_codebook"]:
        return vqvae.decode(codes, force_not_quantize=True, return_dict=False)[0]
    # Such a tokenizer's `decode` takes ids; what it does behind the codebook takes mixtures too.
    hook = getattr(vqvae, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(vqvae)
    spatial = codes if vqvae.config["norm_type"] == "spatial" else None
    return vqvae.decoder(vqvae.post_quant_conv(codes), spatial)


__all__ = [
    "check_tokenizer",
    "check_vocabulary",
    "decode_embeddings",
    "encode_tokens",
    "mixed_embeddings",
    "token_embeddings",
    "token_stride",
    "vocabulary_size",
]
