"""RCG at toy size, of each kind of network."""

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel
from diffusers_repr.pipelines.rcg import RCGPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler

from diffusers_repr.models import RepresentationMLPModel, VectorEmbedding
from diffusers_repr.models.convert_representation import SCHEDULER
from tests.objectives.cases import shake
from tests.pipelines.sit_cases import autoencoder
from tests.pipelines.sit_cases import network as sit

D = 6


def seed(value=0):
    return torch.Generator().manual_seed(value)


def prior(**changes):
    network = RepresentationMLPModel(D, 16, 2, time_embed_dim=8, class_embed_dim=4, **changes)
    return shake(network).eval(), DDIMScheduler(**SCHEDULER)


def unet():
    torch.manual_seed(0)
    return UNet2DModel(8, 3, 3, block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2, class_embed_type="identity",
                       layers_per_block=1).eval()  # fmt: skip


def text_unet(width):
    torch.manual_seed(0)
    return UNet2DConditionModel(8, 4, 4, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=width,
                                attention_head_dim=4, layers_per_block=1,
                                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")).eval()  # fmt: skip


def embedding(width):
    torch.manual_seed(1)
    return VectorEmbedding(D, width).eval()


def pixels(kind):
    """The half that makes images."""
    if kind == "sit":
        return {"transformer": sit(num_classes=0, condition_dim=D), "scheduler": FlowMatchODEScheduler()}
    if kind == "unet":
        return {"unet": unet(), "scheduler": DDIMScheduler(), "condition_embedding": embedding(32)}
    return {"unet": text_unet(8), "scheduler": DDIMScheduler(), "vae": autoencoder(),
            "condition_embedding": embedding(8)}  # fmt: skip


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(kind="sit", **changes):
    network, scheduler = prior(**changes)
    return quiet(RCGPipeline(network, scheduler, **pixels(kind)))
