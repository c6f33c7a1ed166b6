"""An ensemble with one encoding: the mean, one draw an image, or one draw a member, as DIFT's code has it."""

import pytest
import torch

from diffusers_repr import Denoiser, FeatureExtractor
from diffusers_repr.features.noise_policy import keyed_generator, pixel_keys
from diffusers_repr.features.presets import presets
from tests.testers.models import build

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(**settings):
    pipe = build("sd")
    calls = []
    handle = pipe.vae.encoder.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    extractor = FeatureExtractor(Denoiser.from_pipe(pipe), "mid_block", 261, image_size=32, seed=3, **settings)
    return extractor, calls, handle


def test_members_draw_their_own_latents_from_one_encoding():
    """Against the reference's way: the image repeated, the VAE run for each copy, a sample and noise each."""
    extractor, calls, handle = make(sample_posterior="per_member", ensemble_size=4)
    got = extractor(IMAGES, prompt="a cat")["mid_block"]
    assert sum(calls) == 2
    handle.remove()
    denoiser, keys = extractor.denoiser, pixel_keys(2 * IMAGES - 1)
    want = []
    for image, key in zip(IMAGES, keys, strict=True):
        drawn = [keyed_generator(3, key, "posterior", member) for member in range(4)]
        copies = denoiser.encode_pixels((2 * image - 1).expand(4, -1, -1, -1), sample=True, generator=drawn)
        noise = extractor.noise.draw([key] * 4, range(4), copies.shape[1:])
        x_t = denoiser.add_noise(copies, extractor.levels[0], noise)
        features = {}
        hook = denoiser.model.mid_block.register_forward_hook(lambda m, a, out: features.update(out=out))  # noqa: B023
        with torch.no_grad():
            denoiser.predict(x_t, extractor.levels[0], denoiser.condition("a cat", batch=4))
        hook.remove()
        want.append(features["out"].double().mean(0))
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=1e-4, atol=1e-5)


def test_the_three_ways_differ_and_repeat():
    found = {}
    for sample in (False, True, "per_member"):
        extractor, _, handle = make(sample_posterior=sample, ensemble_size=2, batch_size=3)
        found[sample] = extractor(IMAGES)["mid_block"]
        torch.testing.assert_close(extractor(IMAGES[1:])["mid_block"], found[sample][1:], atol=1e-5, rtol=1e-4)
        assert extractor.replace(batch_size=None).sample_posterior == sample
        handle.remove()
    values = list(found.values())
    assert all(float((a - b).abs().max()) > 1e-5 for a, b in zip(values, values[1:] + values[:1], strict=True))


def test_variance_of_the_mean_falls_with_the_members():
    """About 1 / E of that of one draw, over 64 repetitions."""
    variances = []
    for members in (1, 4):
        extractor, _, handle = make(sample_posterior="per_member", ensemble_size=members)
        ids = [str(at) for at in range(64)]
        found = extractor(IMAGES[:1].expand(64, -1, -1, -1), ids=ids)["mid_block"]
        variances.append(float(found.var(0).mean()))
        handle.remove()
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.3)


def test_members_with_one_noise_equal_one():
    """E copies with the same noise and latents: the mean is the one."""
    one, four = (
        FeatureExtractor(Denoiser.from_pipe(build("ddim")), "mid_block", 261, ensemble_size=e, image_size="keep")
        for e in (1, 4)
    )
    noise = one.noise.draw(["x"], [0], (3, 16, 16))
    four.noise.draw = lambda keys, members, shape: noise.expand(len(keys), -1, -1, -1)
    image = IMAGES[:1, :, :16, :16]
    torch.testing.assert_close(four(image, ids=["x"])["mid_block"], one(image, ids=["x"])["mid_block"])


def test_what_is_refused():
    with pytest.raises(ValueError, match="True, False or 'per_member'; got 'each'"):
        make(sample_posterior="each")
    with pytest.raises(ValueError, match="from a VAE's posterior; this model has none"):
        FeatureExtractor(Denoiser.from_pipe(build("ddim")), "mid_block", 1, sample_posterior="per_member")
    with pytest.raises(ValueError, match="noise='clean' has no ensemble"):
        make(sample_posterior="per_member", noise="clean")


def test_presets_of_dift_sample_as_the_paper():
    for method in ("dift", "dift-hpatches", "dift-davis"):
        assert presets(method, "sd").arguments()["sample_posterior"] == "per_member"
        assert presets(method, "adm-256").arguments()["sample_posterior"] is False
