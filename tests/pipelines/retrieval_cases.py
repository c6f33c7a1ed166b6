"""A tiny network that sees neighbours, its pipeline, and an index."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers_repr.pipelines.retrieval_diffusion import RetrievalDiffusionPipeline

from diffusers_repr.assign import RetrievalIndex
from diffusers_repr.models import NullTokens

DIM = 6
ENCODER = {"encoder": "planted", "weights": "a"}


def network(**changes) -> UNet2DConditionModel:
    torch.manual_seed(0)
    settings = {
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4, "attention_head_dim": 2, "cross_attention_dim": DIM,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def pipeline(**settings) -> RetrievalDiffusionPipeline:
    parts = {"unet": network(), "scheduler": DDIMScheduler(), "null_tokens": NullTokens(DIM).eval()}
    pipe = RetrievalDiffusionPipeline(**{**parts, "k": 3, "index_encoder": ENCODER, **settings})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed))


def index(count: int = 30, seed: int = 0) -> RetrievalIndex:
    return RetrievalIndex.build(vectors(count, seed), encoder=ENCODER)
