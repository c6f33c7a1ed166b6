"""Images, a VAE and calls for the tests of the latent cache."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL

from diffusers_repr.data.cache_writer import CacheSettings
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.latents import cache_latents
from diffusers_repr.data.loading import load_train_data
from tests.data.data_cases import rows

ROWS = 11  # prime: shards of 4 leave a short one
SIZE = 16


def make_vae(seed=0, **config):
    torch.manual_seed(seed)
    settings = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": SIZE,
        "scaling_factor": 0.5,
        "shift_factor": 0.1,
    }
    return AutoencoderKL(**settings | config).eval()


def load(data=None, size=SIZE, vae=None, needs_pixels=False, encoders=(), **settings):
    data = rows(ROWS, ((24, 31), (17, 16), (40, 40))) if data is None else data
    return load_train_data(
        DataConfig(**settings), 3, size, data, vae=vae, needs_pixels=needs_pixels, encoders=encoders
    )


def make(out, data=None, vae=None, **settings):
    settings = CacheSettings(**{"shard_size": 4, "batch_size": 3, "progress": False, **settings})
    return cache_latents(vae or make_vae(), load() if data is None else data, out, settings)


def contents(folder):
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and not p.name.startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}
