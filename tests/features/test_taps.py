"""Taps against hooks on full passes; windows against whole images."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from diffusers_repr import Denoiser
from diffusers_repr.capture import capture
from diffusers_repr.features.taps import find_taps, read_taps
from diffusers_repr.features.windows import cut_windows, stitch_windows, window_places
from tests.testers.models import autoencoder, build


@pytest.fixture(scope="module")
def sd():
    return Denoiser.from_pipe(build("sd"))


@pytest.fixture(scope="module")
def pixels():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def full_passes(denoiser, pixels, noise, ab=None):
    """What hooks read in passes that run to their end, of the stock modules alone."""
    unet, vae, found, handles = denoiser.model, denoiser.vae, {}, []
    for name, part in (("encoder", vae.encoder), ("unet", unet), ("decoder", vae.decoder)):
        for path, module in part.named_modules():
            if path.split(".")[-2:-1] == ["resnets"]:
                key = (name, path)
                handles.append(module.register_forward_pre_hook(lambda m, a, key=key: found.update({key: a[0]})))
    text = denoiser.pipe.encode_prompt("", "cpu", 1, False)[0].expand(len(pixels), -1, -1)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        ab = denoiser.scheduler.alphas_cumprod[0] if ab is None else ab
        unet(ab.sqrt() * latents + (1 - ab).sqrt() * noise, 0, text)
        vae.decode(latents / vae.config.scaling_factor)
    for handle in handles:
        handle.remove()
    return found


def test_the_papers_taps_of_stable_diffusion():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = autoencoder((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
    denoiser = Denoiser(unet, DDIMScheduler(), vae, pipe=build("sd"))
    taps = [(tap.part, tap.path, tap.channels, tap.stride) for tap in find_taps(denoiser)]
    assert taps == [
        ("encoder", "down_blocks.2.resnets.1", 512, 4),
        ("encoder", "down_blocks.3.resnets.1", 512, 8),
        ("unet", "up_blocks.0.resnets.2", 2560, 64),
        ("unet", "up_blocks.1.resnets.2", 1920, 32),
        ("unet", "up_blocks.2.resnets.2", 960, 16),
        ("unet", "up_blocks.3.resnets.2", 640, 8),
        ("decoder", "up_blocks.0.resnets.2", 512, 8),
        ("decoder", "up_blocks.1.resnets.2", 512, 4),
    ]


def test_taps_equal_those_of_full_passes(sd, pixels):
    taps = find_taps(sd)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(42))
    noise = torch.nn.functional.interpolate(noise, (16, 24), mode="bicubic", align_corners=False)
    full, maps = full_passes(sd, pixels, noise), read_taps(sd, pixels, taps)
    for tap, value in zip(taps, maps, strict=True):
        assert value.shape == (2, tap.channels, 32 // tap.stride, 48 // tap.stride)
        # The scheduler's float32 table is off by 7e-5 in the noise's coefficient at t = 0, which `add_noise` is not.
        torch.testing.assert_close(value, full[tap.part, tap.path], rtol=1e-4, atol=3e-5)
    for part in ("encoder", "decoder"):  # the same numbers in the same order, so the same bits
        assert all(torch.equal(m, full[part, t.path]) for t, m in zip(taps, maps, strict=True) if t.part == part)
    with capture(sd.model, "conv_out"):  # keeps the U-Net running to its end
        whole = read_taps(sd, pixels, taps)
    assert all(torch.equal(a, b) for a, b in zip(maps, whole, strict=True))
    some = read_taps(sd, pixels, [taps[-1], taps[3]])
    assert torch.equal(some[0], maps[-1])
    assert torch.equal(some[1], maps[3])


def test_input_of_the_unet_is_the_previous_output_joined_with_the_skip(sd, pixels):
    tap, seen = find_taps(sd)[3], {}
    block = sd.model.up_blocks[1]
    handle = block.attentions[1].register_forward_hook(lambda m, a, out: seen.update(hidden=out[0]))
    down = sd.model.down_blocks[2].resnets[0]  # whose attention's output is the second skip from the end of the stage
    skip = sd.model.down_blocks[1].downsamplers[0].register_forward_hook(lambda m, a, out: seen.update(skip=out))
    value = read_taps(sd, pixels, [tap])[0]
    handle.remove()
    skip.remove()
    assert down.in_channels == seen["skip"].shape[1]
    assert torch.equal(value, torch.cat([seen["hidden"], seen["skip"]], dim=1))


def test_work_that_is_left_out(sd, pixels):
    ran = []
    late = {"unet": sd.model.conv_out, "last": sd.model.up_blocks[3].resnets[2], "decoder": sd.vae.decoder.conv_out}
    handles = [m.register_forward_pre_hook(lambda m, a, n=n: ran.append(n)) for n, m in late.items()]
    read_taps(sd, pixels, find_taps(sd)[:6])
    read_taps(sd, pixels, find_taps(sd)[6:])
    for handle in handles:
        handle.remove()
    assert ran == ["last"]  # torch calls the hook that was there first, then the one that stops


def test_clean_and_noisy_and_what_is_added(sd, pixels):
    taps = find_taps(sd)[2:6]
    noisy, clean = (read_taps(sd, pixels, taps, timestep=t)[-1] for t in (0, None))
    expected = full_passes(sd, pixels, 0, ab=torch.ones(()))["unet", taps[-1].path]
    torch.testing.assert_close(clean, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(clean, noisy, atol=1e-3)
    context = torch.zeros(2, 77, 16, requires_grad=True)
    shift = torch.zeros(2, sd.model.time_embedding.linear_2.out_features, requires_grad=True)
    maps = read_taps(sd, pixels, taps, context=context, time_shift=shift)
    assert torch.equal(maps[-1], noisy)
    sum((value * torch.linspace(0, 1, value.shape[-1])).sum() for value in maps).backward()
    assert context.grad.abs().sum() > 0
    assert shift.grad.abs().sum() > 0
    assert all(p.requires_grad and p.grad is None for p in sd.model.parameters())
    moved = read_taps(sd, pixels, taps, context=context + 1)[-1]
    assert not torch.allclose(moved, noisy)
    for wrong in ({"context": context[:1]}, {"time_shift": shift[:, :3]}):
        with pytest.raises(ValueError, match="cannot be added"):
            read_taps(sd, pixels, taps, **wrong)


def test_other_bases_are_refused(sd):
    for name, message in (("ddpm", "network must be of UNet2DCond"), ("pixart", "got PixArt"), ("dit", "got DiT")):
        with pytest.raises(TypeError, match=message):
            find_taps(Denoiser.from_pipe(build(name)))
    with pytest.raises(ValueError, match="no text encoder"):
        find_taps(Denoiser(sd.model, sd.scheduler, sd.vae))
    pipe = build("sd")
    with pytest.raises(TypeError, match="VAE must be of AutoencoderKL; got none"):
        find_taps(Denoiser(pipe.unet, pipe.scheduler, pipe=pipe))
    pipe.vae.enable_slicing()
    with pytest.raises(ValueError, match="disable_slicing"):
        find_taps(Denoiser.from_pipe(pipe))
    with pytest.raises(ValueError, match="multiple"):
        read_taps(sd, torch.zeros(1, 3, 32, 33), find_taps(sd))


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 80)])
def test_windows_of_a_local_model_equal_the_whole(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Sequential(torch.nn.AvgPool2d(4), torch.nn.Conv2d(3, 5, 1))
    side = min(32, *size)
    places = window_places(size, side)
    count = stitch_windows(torch.ones(2 * len(places), 1, 8, 8), places, side, size, 4)
    assert (count == 1).all()
    whole = stitch_windows(model(cut_windows(images, places, side)), places, side, size, 4)
    torch.testing.assert_close(whole, model(images))


def test_windows_that_do_not_fit():
    assert window_places((4, 4), 4) == [(0, 0)]
    assert window_places((5, 9), 4) == [(0, 0), (0, 4), (0, 5), (1, 0), (1, 4), (1, 5)]
    with pytest.raises(ValueError, match="side must be"):
        window_places((4, 8), 5)
    with pytest.raises(ValueError, match="pad it to a multiple of 4"):
        stitch_windows(torch.ones(2, 1, 1, 1), window_places((4, 6), 4), 4, (4, 6), 4)
    with pytest.raises(ValueError, match="2 windows of 2 x 2"):
        stitch_windows(torch.ones(3, 1, 2, 2), window_places((4, 6), 4), 4, (4, 6), 2)
