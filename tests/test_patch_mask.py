"""Patch masks as a noise process: counts, masks by a loop over samples, the scheduler, features at any batch."""

import math
from fractions import Fraction

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers_repr.schedulers_ext.scheduling_patch_mask import PatchMaskScheduler

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.encoders import Encoder
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, add_noise
from diffusers_repr.noise.patch_mask import mask_patches, noise_mask, patch_mask, visible_patches
from diffusers_repr.noise.process_record import process_record
from tests.objectives.cases import shake
from tests.testers.models import unet2d

MASKS = NoiseSchedule("patch_mask", "sample", patch_size=2)


def images(count=3, channels=2, height=4, width=6, seed=0):
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def by_loops(x0, noise, timesteps, patch, total):
    """Sample by sample, patch by patch: those with the largest sums of noise go, as many as MDM's code says."""
    masked = x0.clone()
    for n, t in enumerate(timesteps):
        places = [(i, j) for i in range(0, x0.shape[2], patch) for j in range(0, x0.shape[3], patch)]

        def total_noise(at, n=n):
            return float(noise[n, :, at[0] : at[0] + patch, at[1] : at[1] + patch].double().sum())

        places.sort(key=total_noise)
        for i, j in places[int(len(places) * (1 - t / total)) :]:
            masked[n, :, i : i + patch, j : j + patch] = 0
    return masked


def test_the_count_is_that_of_the_authors_code_at_every_timestep():
    times = torch.arange(1000)
    for patches in (1024, 16):
        assert visible_patches(times, patches, 1000).tolist() == [int(patches * (1 - t / 1000)) for t in range(1000)]
    # of 15 patches that code rounds 15 * (1 - 0.8) down to 2; the formula has 3
    assert visible_patches(times, 15, 1000).tolist() == [int(15 * (1 - Fraction(t, 1000))) for t in range(1000)]
    assert visible_patches(50, 1024, 1000).item() == 972


def test_masks_are_those_of_the_loop():
    x0, noise, times = images(5), images(5, seed=1), [0, 130, 500, 501, 999]
    level = MASKS.resolve(torch.tensor(times))
    masked = add_noise(x0, level, noise)
    assert torch.equal(masked, by_loops(x0, noise, times, 2, 1000))
    assert torch.equal(masked[0], x0[0])  # t = 0, bitwise
    assert torch.equal(noise_mask(noise, level).expand_as(x0), masked != 0)
    assert torch.equal(PatchMaskScheduler(patch_size=2).add_noise(x0, noise, torch.tensor(times)), masked)
    assert (masked[2] == 0).float().mean() == 0.5
    shown = masked.abs().sum(1) > 0
    assert not torch.equal(shown[2], add_noise(x0, level, images(5, seed=2)).abs().sum(1)[2] > 0)
    alone = torch.cat([add_noise(x0[n : n + 1], MASKS.resolve(times[n]), noise[n : n + 1]) for n in range(5)])
    assert torch.equal(alone, masked)
    assert add_noise(x0.bfloat16(), level, noise).dtype == torch.bfloat16


def test_every_patch_is_masked_as_often_and_ties_are_counted():
    mask = patch_mask(torch.randn(4000, 3, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(5))
    assert mask.sum((1, 2)).unique().tolist() == [5]
    share, sigma = mask.double().mean(0), math.sqrt(5 / 12 * 7 / 12 / 4000)
    assert bool(((share - 5 / 12).abs() < 4 * sigma).all())
    assert patch_mask(torch.zeros(2, 3, 4), torch.tensor([5, 0])).sum((1, 2)).tolist() == [5, 0]


def test_levels():
    level = MASKS.resolve(250)
    assert (level.alpha, level.sigma) == (0.75, 0.25)
    assert MASKS.resolve(NoiseLevel(nsr=level.nsr)).timestep == pytest.approx(250)
    assert MASKS.resolve(10) < MASKS.resolve(11)
    by_hand = MASKS.resolve(NoiseLevel(250, alpha=0.75, sigma=0.25))
    assert torch.equal(add_noise(images(), by_hand, images(seed=1)), add_noise(images(), level, images(seed=1)))
    with pytest.raises(ValueError, match="outside"):
        MASKS.resolve(1000)
    other = NoiseSchedule("patch_mask", "sample", patch_size=4)
    assert not MASKS.same_process(other)
    assert not process_record(MASKS).same_as(process_record(other))
    assert MASKS.same_process(NoiseSchedule.from_scheduler(PatchMaskScheduler(patch_size=2)))
    for wrong in ({"patch_size": 0}, {"patch_size": 2, "output": "epsilon"}):
        with pytest.raises(ValueError, match="needs patch_size"):
            NoiseSchedule(**{"kind": "patch_mask", "output": "sample", **wrong})


def test_a_patch_that_does_not_divide_the_image_is_refused():
    with pytest.raises(ValueError, match=r"3 x 3 do not divide images of 4 x 6, and .* not padded; take .* 1, 2, or"):
        mask_patches(images(), 500, torch.zeros(3, 1, 2), 3, 1000)
    with pytest.raises(ValueError, match="do not divide"):
        PatchMaskScheduler(patch_size=3).add_noise(images(), images(), 500)


# The scheduler


def test_the_sampler_shows_patch_after_patch():
    scheduler = PatchMaskScheduler(patch_size=2)
    scheduler.set_timesteps(4)
    x, generator = torch.zeros(3, 2, 4, 8), torch.Generator().manual_seed(0)
    counts = []
    for step, t in enumerate(scheduler.timesteps):
        before = x
        x = scheduler.step(torch.full_like(x, step + 1.0), t, x, generator).prev_sample
        assert torch.equal(x[before != 0], before[before != 0])
        counts.append((x != 0).float().mean((1, 2, 3)).mul(8).tolist())
    assert counts == [[2.0] * 3, [4.0] * 3, [6.0] * 3, [8.0] * 3]
    assert sorted(x.unique().tolist()) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="Start from zeros"):
        scheduler.step(x, 999, images(3, 2, 4, 8))
    with pytest.raises(ValueError, match="none of this grid"):
        scheduler.step(x, 998, x)
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            scheduler.set_timesteps(wrong)
    with pytest.raises(ValueError, match="1 or more"):
        PatchMaskScheduler(patch_size=0)


# Features


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mdm")
    unet = shake(unet2d(1, sample_size=8), std=0.1)
    DDPMPipeline(unet, PatchMaskScheduler(patch_size=2)).save_pretrained(path)
    return path


def test_a_folder_is_read_with_masks_the_same_at_any_batch(folder):
    denoiser = Denoiser.from_pretrained(folder)
    assert denoiser.schedule.same_process(MASKS)
    x, seen = images(4, 1, 8, 8), []
    handle = denoiser.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("sample", args[0] if args else None)), with_kwargs=True
    )
    extractor = FeatureExtractor(denoiser, ["mid_block", "up_blocks.0"], [50, 500], seed=3)
    together = extractor.from_pixels(x)
    masked = torch.cat(seen)
    assert ((masked == 0).float().mean((1, 2, 3)) * 16).tolist() == [1.0] * 4 + [8.0] * 4
    assert torch.equal(masked[masked != 0], x.repeat(2, 1, 1, 1)[masked != 0])
    assert len({tuple((row == 0).flatten().tolist()) for row in masked[4:]}) == 4, "each image has a mask of its own"
    seen.clear()
    for layer in extractor.layers:
        alone = torch.cat([extractor.from_pixels(x[n : n + 1])[layer] for n in range(4)], dim=1)
        torch.testing.assert_close(alone, together[layer], atol=1e-5, rtol=1e-4)
    assert torch.equal(torch.cat(seen[:4])[1::2], masked[4:])
    handle.remove()
    assert not torch.equal(extractor.replace(seed=4).from_pixels(x)["mid_block"], together["mid_block"])
    encoder = Encoder.from_denoiser(denoiser, "mid_block", 500, noise_seed=3)
    found = encoder.encode_pixels(x / 4)["global"]
    alone = torch.cat([encoder.encode_pixels(x[n : n + 1] / 4)["global"] for n in range(4)])
    torch.testing.assert_close(alone, found, atol=1e-5, rtol=1e-4)


def test_what_masks_do_not_tell_is_refused(folder):
    prediction = Denoiser.from_pretrained(folder).predict(images(2, 1, 8, 8), 500)
    assert prediction.x0.shape == (2, 1, 8, 8)
    for name in ("eps", "v", "velocity", "score"):
        with pytest.raises(ValueError, match="trained on masked patches"):
            getattr(prediction, name)


def test_a_gaussian_network_is_not_masked():
    noisy = Denoiser(unet2d(1, sample_size=8), DDPMScheduler()).add_noise(images(2, 1, 8, 8), 500, images(2, 1, 8, 8))
    assert bool((noisy != 0).all())
