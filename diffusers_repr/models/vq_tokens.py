"""Tokens of a `VQModel` or `MaskGITVQModel`: images to ids, ids or mixtures of them to codes, codes to images."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import VQModel
from torch import Tensor

from diffusers_repr.models.maskgit_vq import MaskGITVQModel

Tokenizer = VQModel | MaskGITVQModel


def check_tokenizer(vqvae: Any) -> Any:
    """The tokenizer, if it is one.

    Raises:
        TypeError: For another class.
    """
    if not isinstance(vqvae, Tokenizer):
        raise TypeError(f"The tokenizer is a VQModel or a MaskGITVQModel; got {type(vqvae).__name__}.")
    return vqvae


def vocabulary_size(vqvae: Any) -> int:
    """V, ids of a tokenizer."""
    return int(vqvae.config["num_vq_embeddings"])


def token_stride(vqvae: Any) -> int:
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
                f"The {name} reads patches of {network.config['patch_size']} pixels and "
                f"{network.config['in_channels']} channels; a token of the tokenizer is one of {stride} pixels and "
                f"{channels} channels."
            )


@torch.no_grad()
def encode_tokens(vqvae: Any, pixels: Tensor) -> Tensor:
    """Ids `(B, h, w)`, int64, of images `(B, C, H, W)` in [-1, 1].

    Outside of any autocast, so that ids are those of the tokenizer's own precision.

    Args:
        vqvae: The tokenizer.
        pixels: The images.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        latents = vqvae.encode(pixels.to(vqvae.dtype)).latents
        # Not by `quantize`, which has no half precision on the CPU.
        codes = token_embeddings(vqvae, torch.arange(vocabulary_size(vqvae), device=latents.device))
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        ids = torch.cdist(flat.float(), codes.float()).argmin(1)
    return ids.view(len(pixels), *latents.shape[2:])


def token_embeddings(vqvae: Any, ids: Tensor) -> Tensor:
    """The codes `(..., D)` of ids `(...)`, on their device."""
    embedding = vqvae.quantize.embedding  # whose weights offloading keeps elsewhere until it is called
    where = ids.device if embedding.weight.is_meta else embedding.weight.device
    return embedding(ids.to(where)).to(ids.device)


def mixed_embeddings(vqvae: Any, ids: Tensor, mask: Tensor, probabilities: Tensor) -> Tensor:
    """Codes `(B, N, D)`: expected ones where a token is masked, those of the ids elsewhere (ADDP's canvas).

    Args:
        vqvae: The tokenizer.
        ids: `(B, N)`.
        mask: `(B, N)`, boolean.
        probabilities: Of the ids, `(B, N, V)`.
    """
    codes = token_embeddings(vqvae, torch.arange(probabilities.shape[-1], device=ids.device))
    return torch.where(mask[..., None], probabilities.to(codes.dtype) @ codes, codes[ids])


def decode_embeddings(vqvae: Any, embeddings: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images `(B, C, H, W)` of codes or mixtures of codes `(B, N, D)`; not clamped.

    Args:
        vqvae: The tokenizer.
        embeddings: As `token_embeddings` and `mixed_embeddings` give them, row by row.
        grid: (h, w) in tokens.
    """
    codes = embeddings.transpose(1, 2).unflatten(2, grid)
    if not vqvae.config.get("lookup_from_codebook"):
        return vqvae.decode(codes, force_not_quantize=True, return_dict=False)[0]
    # Such a tokenizer's `decode` takes ids; what it does behind the codebook takes mixtures too.
    hook = getattr(vqvae, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(vqvae)
    spatial = codes if vqvae.config["norm_type"] == "spatial" else None
    return vqvae.decoder(vqvae.post_quant_conv(codes), spatial)


__all__ = [
    "Tokenizer",
    "check_tokenizer",
    "check_vocabulary",
    "decode_embeddings",
    "encode_tokens",
    "mixed_embeddings",
    "token_embeddings",
    "token_stride",
    "vocabulary_size",
]
