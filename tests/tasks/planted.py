"""Small images with a class one can see, and a tiny real pipeline to read them with."""

import functools

import datasets
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

from diffusers_repr.tasks import Probe

NAMES = ["dark", "left", "right"]
LAYERS = ["mid_block", "up_blocks.0"]


def pipeline(seed=0, **changes):
    """An untrained DDPM of grey 16 x 16 images; made without touching the global random state."""
    settings = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(**{**settings, **changes}).eval()
    pipe = DDPMPipeline(unet=unet, scheduler=DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(rows, seed=0):
    """`(images, labels)`: PIL images with a bright side or none, and noise."""
    generator = np.random.default_rng(seed)
    labels = [i % 3 for i in range(rows)]
    pixels = generator.uniform(0, 80, (rows, 16, 16))
    for at, label in enumerate(labels):
        if label:
            pixels[at, :, 8 * (label - 1) : 8 * label] += 150
    return [Image.fromarray(p.astype(np.uint8)) for p in pixels], labels


def dataset(rows, seed=0):
    """The same as a data set with class names."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    pictures, labels = images(rows, seed)
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


@functools.cache
def fitted():
    """A probe on an unsaved pipeline, with a validation score; do not change it."""
    settings = {"layers": LAYERS, "timestep": 50, "pooling": "adaptive:2", "label_names": NAMES}
    return Probe.fit(pipeline(), images(60), images(30, seed=1), **settings)


def small(source=None, **changes):
    """A probe that is quick to fit."""
    settings = {"layers": ["mid_block"], "timestep": 50, "protocol": "ridge", **changes}
    return Probe.fit(pipeline() if source is None else source, images(24), **settings)
