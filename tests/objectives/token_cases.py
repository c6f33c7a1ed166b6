"""A tokenizer and networks of its tokens, tiny: images of 8 x 8 pixels, 4 x 4 tokens, 7 codes."""

import torch
from diffusers import VQModel

from diffusers_repr.models import MaskedTokenModel, PixelTokenModel
from tests.objectives.cases import shake

SIZES = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "decoder_num_layers": 1,
         "decoder_num_attention_heads": 2, "mlp_ratio": 2.0}  # fmt: skip
VQ = {"in_channels": 1, "out_channels": 1, "latent_channels": 3, "sample_size": 8, "num_vq_embeddings": 7,
      "block_out_channels": [4, 8], "norm_num_groups": 2, "down_block_types": ["DownEncoderBlock2D"] * 2,
      "up_block_types": ["UpDecoderBlock2D"] * 2, "mid_block_add_attention": False}  # fmt: skip


def tokenizer(**changes) -> VQModel:
    """Codes that lie among the latents, so that all are used."""
    torch.manual_seed(0)
    vqvae = VQModel(**{**VQ, **changes}).eval()
    with torch.no_grad():
        latents = vqvae.encode(images(4, 5)).latents.permute(0, 2, 3, 1).flatten(0, 2)
        rows = torch.linspace(0, len(latents) - 1, vqvae.config.num_vq_embeddings).long()
        vqvae.quantize.embedding.weight.copy_(latents[rows])
    return vqvae


def images(count: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def masked_model(vocab_size: int = 7, sample_size=4, **changes) -> MaskedTokenModel:
    return shake(MaskedTokenModel(vocab_size, sample_size, **{**SIZES, **changes})).eval()


def pixel_model(vocab_size: int = 7, sample_size=8, patch_size: int = 2, **changes) -> PixelTokenModel:
    return shake(PixelTokenModel(vocab_size, sample_size, patch_size, 1, **{**SIZES, **changes})).eval()
