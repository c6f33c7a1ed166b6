"""What an extraction shows of itself."""

import torch

from diffusers_repr.features import FeatureOutput
from diffusers_repr.noise import NoiseLevel


def test_shown_by_shapes():
    level = NoiseLevel(nsr=0.5)
    output = FeatureOutput({"mid_block": torch.zeros(2, 4), "conv_in": torch.zeros(2, 3)}, level, {}, "mean")
    shapes = "{'mid_block': (2, 4), 'conv_in': (2, 3)}"
    assert (
        repr(output) == f"FeatureOutput({shapes},\n    timestep=NoiseLevel(nsr=0.5), pooling='mean', image_size=None)"
    )
