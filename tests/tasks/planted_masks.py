"""Small images of two brightnesses and their masks, and a segmenter that has learned them."""

import functools

import datasets
import numpy as np
from PIL import Image

from diffusers_repr.heads.fitting.pixels import DDPM_SEG
from diffusers_repr.tasks import Segmenter
from tests.tasks.planted import pipeline

LAYERS = ["mid_block", "up_blocks.1"]
CLASSES = ["ground", "bright", "grey"]
QUICK = DDPM_SEG.replace(max_epochs=3, learning_rate=1e-2)


def annotated(rows, seed=0, size=(16, 16)):
    """`(images, masks)`: PIL images with a bright and a grey rectangle on dark ground; arrays of their classes."""
    generator = np.random.default_rng(seed)
    images, masks = [], []
    for _ in range(rows):
        mask = np.zeros(size, np.int64)
        for label in (1, 2):
            top, left = generator.integers(0, size[0] - 6), generator.integers(0, size[1] - 7)
            mask[top : top + 6, left : left + 7] = label
        pixels = np.array([20, 230, 120])[mask] + generator.uniform(-15, 15, size)
        images.append(Image.fromarray(pixels.astype(np.uint8)))
        masks.append(mask)
    return images, masks


def dataset(rows, seed=0):
    """The same as a data set, masks as images."""
    images, masks = annotated(rows, seed)
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    pictures = [Image.fromarray(mask.astype(np.uint8)) for mask in masks]
    return datasets.Dataset.from_dict({"image": images, "mask": pictures}, features=features)


def small(source=None, train=None, **changes):
    """A segmenter that is quick to fit."""
    given = isinstance(source, object) and hasattr(source, "layers")
    reads = {} if given else {"layers": LAYERS, "timestep": [10, 100]}
    settings = {"members": 3, "protocol": QUICK, "label_names": CLASSES, **reads, **changes}
    train = annotated(6) if train is None else train
    return Segmenter.fit(pipeline() if source is None else source, train, **settings)


@functools.cache
def fitted():
    """One on an unsaved pipeline, with a validation score; do not change it."""
    return small(validation=annotated(3, seed=1))
