"""Self-attention guidance: defaults of each architecture, and what is refused."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_repr import SAG, Denoiser, guide
from diffusers_repr.guidance.sag import blur_default
from tests.guidance.sag_cases import noise, pixel_model
from tests.testers.models import build


def adm(size):
    """Six levels, as the ImageNet networks of the paper, with two channels a group."""
    return UNet2DModel(
        sample_size=size,
        block_out_channels=(4, 4, 4, 4, 4, 4),
        down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",) * 3,
        norm_num_groups=2,
        attention_head_dim=2,
    )


@pytest.mark.parametrize(
    ("size", "blur"), [(256, (9.0, 31)), (128, (3.0, 31)), (64, (1.0, 9)), ((128, 256), (3.0, 31))]
)
def test_defaults_of_pixel_networks(size, blur):
    denoiser = Denoiser(adm(size), DDIMScheduler())
    term = SAG().bind(denoiser)
    assert term.layers == ("up_blocks.0.attentions.2",)
    assert (term.blur_sigma, term.kernel_size) == blur == blur_default(denoiser)[:2]


@pytest.mark.parametrize("name", ["sd", "sdxl", "dit", "pixart"])
def test_defaults_of_latent_networks(name):
    term = SAG().bind(Denoiser.from_pipe(build(name)))
    assert (term.blur_sigma, term.kernel_size) == (1.0, 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blur_sigma": 0.0}, "blur_sigma must be above 0"),
        ({"blur_sigma": float("nan")}, "blur_sigma must be finite"),
        ({"kernel_size": 8}, "odd whole number"),
        ({"kernel_size": True}, "odd whole number"),
        ({"kernel_size": -1}, "odd whole number"),
        ({"threshold": float("inf")}, "threshold must be finite"),
        ({"clip": -1.0}, "clip must be above 0"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"interval": (900, 100)}, "wrong way round"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SAG(**settings)


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("sd3", None, "joint attention.*SAG is defined for attention among image tokens alone"),
        ("flux", None, "SAG is defined for attention among image tokens alone"),
        ("sana", None, "linear attention"),
        ("sd", "mid_block.attentions.0.transformer_blocks.0.attn2", "matches cross-attention only"),
        ("sd", "mid_block.attentions.0", "is no attention module.*Self-attention"),
        ("sd", "mid_block.attentions.9", "matches nothing"),
        ("sd", "down_blocks.0.*", "reads the attention of one layer.*matches 2: down_blocks.0"),
    ],
)
def test_layers_that_cannot_be_read(name, layers, message):
    pipe = build(name)
    with pytest.raises(ValueError, match=message):
        guide(pipe, SAG(layers=layers))
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@torch.no_grad()
def test_an_image_too_small_for_the_kernel():
    model, x = pixel_model(), noise(1, 2, 8, 12)
    denoiser = Denoiser(model, DDIMScheduler())
    message = r"kernel_size=31 mirrors 15 pixels.*8 x 12.*kernel_size=15 or less fits"
    with pytest.raises(ValueError, match=message), guide(denoiser, SAG(kernel_size=31)):
        model(x, 500)
    with guide(denoiser, SAG(kernel_size=15)):
        assert bool(model(x, 500).sample.isfinite().all())
