"""Encoding and decoding: scale, shift, statistics, posterior, dtype, finiteness."""

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.utils.torch_utils import randn_tensor
from torch.testing import assert_close

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.vae import decode_latents, encode_latents, vae_stride
from tests.testers.models import PIPELINES, SIZES, autoencoder, build

LATENT = [name for name in sorted(PIPELINES) if name not in ("ddpm", "ddim", "class_unet")]
PIXELS = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def seeded(cls, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**settings).eval()


def vae(**changes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return autoencoder(**changes).eval()


@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_encode_gives_the_latents_that_the_pipeline_decodes(name):
    """Decoding as the pipeline does (its own formula) undoes our scaling."""
    pipe = build(name)
    denoiser = Denoiser.from_pipe(pipe)
    h, w = SIZES[name]
    images = torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(1))
    x0 = denoiser.encode(images, image_size="keep")
    assert x0.shape[1:] == (denoiser.family.channels(), h // denoiser.stride, w // denoiser.stride)
    config = pipe.vae.config
    raw = x0 / config.scaling_factor + (config.get("shift_factor") or 0.0)
    want = (pipe.vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)
    assert_close(denoiser.decode(x0), want, rtol=1e-5, atol=1e-5)
    out = pipe.vae.encode(2 * images - 1)
    mean = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent
    assert_close(raw, mean, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scale_shift_and_statistics():
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.0, 2.0, 0.5, 4.0]
    plain = vae(scaling_factor=1.0)
    z = plain.encode(PIXELS).latent_dist.mode()
    assert_close(encode_latents(plain, PIXELS), z)
    assert_close(encode_latents(vae(scaling_factor=0.5, shift_factor=0.25), PIXELS), (z - 0.25) * 0.5)
    both = vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    want = (z - torch.tensor(mean).view(1, 4, 1, 1)) * 0.5 / torch.tensor(std).view(1, 4, 1, 1)
    assert_close(encode_latents(both, PIXELS), want)
    for model in (plain, both, vae(scaling_factor=0.5, shift_factor=0.25)):
        assert_close(
            decode_latents(model, encode_latents(model, PIXELS)), plain.decode(z).sample, rtol=1e-4, atol=1e-5
        )


@torch.no_grad()
def test_posterior_mean_by_default_and_seeded_samples():
    model = vae(scaling_factor=2.0)
    posterior = model.encode(PIXELS).latent_dist
    state = torch.get_rng_state()
    assert_close(encode_latents(model, PIXELS), 2 * posterior.mean)
    assert_close(encode_latents(model, PIXELS), encode_latents(model, PIXELS), rtol=0, atol=0)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    drawn = encode_latents(model, PIXELS, sample=True, generator=generators())
    noise = randn_tensor(posterior.mean.shape, generator=generators())
    assert_close(drawn, 2 * (posterior.mean + posterior.std * noise))
    # one generator an image: an image's draw does not depend on its neighbours
    alone = encode_latents(model, PIXELS[1:], sample=True, generator=generators()[1:])
    assert_close(drawn[1:], alone, rtol=1e-4, atol=1e-5)
    one = [encode_latents(model, PIXELS, True, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_force_upcast(dtype):
    """A float16 VAE that overflows works in float32 and is float16 again after, also after an error."""
    model = vae(force_upcast=True).to(dtype)
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    latents = encode_latents(model, PIXELS)
    decode_latents(model, latents)
    wide = torch.float32 if dtype == torch.float16 else dtype
    assert seen == [wide, wide]
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.encoder.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode_latents(model, PIXELS)
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_without_force_upcast_the_vae_keeps_its_dtype():
    model = vae(force_upcast=False).half()
    seen = []
    model.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert encode_latents(model, PIXELS).dtype == torch.float16
    assert seen == [torch.float16]


def test_latents_come_in_the_networks_dtype():
    pipe = build("sdxl").to(dtype=torch.float16)
    denoiser = Denoiser.from_pipe(pipe)
    images = torch.rand(1, 3, 32, 48)
    assert denoiser.encode(images, image_size="keep").dtype == torch.float16
    assert denoiser.decode(denoiser.encode(images, image_size="keep")).dtype == torch.float32
    assert pipe.vae.dtype == torch.float16


def test_a_vae_with_nan_weights_is_named():
    pipe = build("sd")
    torch.nn.init.constant_(pipe.vae.encoder.conv_in.weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"The VAE \(AutoencoderKL, torch.float32\) gave NaN or infinite"):
        Denoiser.from_pipe(pipe).encode(torch.rand(1, 3, 32, 48), image_size="keep")


def test_strides_and_input_channels():
    assert [vae_stride(autoencoder(channels)) for channels in ((8,), (8, 8), (8, 8, 8))] == [1, 2, 4]
    assert vae_stride(build("sana").vae) == 4
    grey = build("sd")
    grey.vae = vae(in_channels=1, out_channels=1)
    denoiser = Denoiser.from_pipe(grey)
    assert denoiser.image_channels == 1
    assert denoiser.encode(torch.rand(1, 1, 32, 48), image_size="keep").shape == (1, 4, 16, 24)
    with pytest.raises(ValueError, match="has 3 channels .*; the model takes 1"):
        denoiser.encode(torch.rand(1, 3, 32, 48), image_size="keep")


@torch.no_grad()
def test_autoencoders_without_a_posterior():
    """VQModel, AutoencoderTiny and AutoencoderDC have one deterministic code."""
    vq = seeded(
        VQModel,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=8,
    )
    tiny = seeded(
        AutoencoderTiny,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    for model in (vq, tiny, build("sana").vae):
        stride = vae_stride(model)
        latents = encode_latents(model, PIXELS)
        assert latents.shape[2:] == (32 // stride, 48 // stride)
        assert decode_latents(model, latents).shape == PIXELS.shape
        with pytest.raises(ValueError, match="has no posterior to sample from"):
            encode_latents(model, PIXELS, sample=True)


@torch.no_grad()
def test_encode_then_decode_is_close_for_a_trained_vae():
    """A VAE fitted to a few smooth images gives them back."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = AutoencoderKL(block_out_channels=(16,), norm_num_groups=4, latent_channels=4, scaling_factor=0.3)
        axis = torch.linspace(-1, 1, 16)
        images = torch.stack([axis.expand(3, 16, 16), axis[:, None].expand(3, 16, 16)]) * 0.8
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for _ in range(60):
            loss = (model.decode(model.encode(images).latent_dist.mode()).sample - images).pow(2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    back = decode_latents(model, encode_latents(model, images))
    assert (back - images).pow(2).mean() < 0.02
    assert (back - images).pow(2).mean() < 0.1 * images.pow(2).mean()
