"""Parts of ODISE: what they are at the start, and their formulas written out."""

import pytest
import torch

from diffusers_repr import Denoiser
from diffusers_repr.features.taps import find_taps, read_taps
from diffusers_repr.heads.odise import FeaturePyramid, ImplicitCaptioner
from tests.testers.models import WIDTH, build


@pytest.fixture(scope="module")
def sd():
    return Denoiser.from_pipe(build("sd"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def captioner_of(denoiser, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImplicitCaptioner(5, 77, WIDTH, denoiser.model.time_embedding.linear_2.out_features)


def test_at_the_start_features_are_those_of_the_empty_prompt_bit_for_bit(sd):
    pixels, vectors = torch.rand(2, 3, 32, 32, generator=seeded()) * 2 - 1, torch.randn(2, 5, generator=seeded())
    taps, captioner = find_taps(sd), captioner_of(sd)
    context, shift = captioner(vectors * 30)
    maps = read_taps(sd, pixels, taps, context=context, time_shift=shift)
    plain = read_taps(sd, pixels, taps)
    assert all(torch.equal(a, b) for a, b in zip(maps, plain, strict=True))
    maps[5].square().mean().backward()
    gradients = {name: p.grad for name, p in captioner.named_parameters()}
    for name in ("text_gate", "time_gate"):
        assert gradients[name].abs().max() > 0
    assert not gradients["text.weight"].any()  # behind a closed gate
    captioner.text_gate.data.fill_(0.3)
    moved = read_taps(sd, pixels, taps, context=captioner(vectors)[0])
    assert not torch.equal(moved[5], plain[5])
    assert torch.equal(moved[-1], plain[-1])  # the VAE does not see the caption


def test_the_captioners_formula():
    captioner = ImplicitCaptioner(3, 2, 4, 5)
    for parameter in captioner.parameters():
        torch.nn.init.normal_(parameter, generator=seeded(1))
    vectors, p = torch.randn(2, 3, generator=seeded()), dict(captioner.named_parameters())
    context, shift = captioner(vectors)
    for b in range(2):
        for token in range(2):
            wv = p["text.weight"] @ vectors[b] + p["text.bias"] + p["text_position"][0, token]
            torch.testing.assert_close(context[b, token], p["text_gate"][0, token].tanh() * wv)
        wv = p["time.weight"] @ vectors[b] + p["time.bias"] + p["time_position"][0]
        torch.testing.assert_close(shift[b], p["time_gate"][0].tanh() * wv)


def test_pyramid_sums_maps_of_equal_stride_after_a_nearest_resize():
    strides, channels = [4, 64, 16, 16, 8], [8, 3, 4, 6, 5]
    pyramid = FeaturePyramid(channels, strides, width=8, bottleneck=4)
    assert pyramid.strides == [4, 8, 16, 32]
    maps = [torch.randn(2, c, 128 // s, 64 // s, generator=seeded(s)) for c, s in zip(channels, strides, strict=True)]
    levels = pyramid(maps, (128, 64))
    assert [tuple(level.shape) for level in levels] == [(2, 8, 128 // s, 64 // s) for s in (4, 8, 16, 32)]
    torch.testing.assert_close(levels[2], pyramid.blocks[2](maps[2]) + pyramid.blocks[3](maps[3]))
    doubled = maps[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(levels[3], pyramid.blocks[1](doubled))
    shortcuts = [type(block.shortcut).__name__ for block in pyramid.blocks]
    assert shortcuts == ["Identity", *["Sequential"] * 4]  # as detectron2: projected where channels differ


def test_a_bottleneck_against_its_formula():
    block, x = FeaturePyramid([6] * 3, [4, 8, 16], width=8, bottleneck=4).blocks[0], torch.randn(2, 6, 5, 7)
    norm = torch.nn.functional.group_norm

    def step(part, value, groups):
        value = torch.nn.functional.conv2d(value, part[0].weight, padding=part[0].weight.shape[-1] // 2)
        return norm(value, groups, part[1].weight, part[1].bias)

    hidden = step(block.middle, step(block.enter, x, 4).relu(), 4).relu()
    torch.testing.assert_close(block(x), (step(block.leave, hidden, 8) + step(block.shortcut, x, 8)).relu())


def test_pyramids_that_cannot_be():
    for strides, bounds in (([4, 8, 8], (4, 32)), ([4, 16, 32], (4, 32)), ([4, 8, 16, 32], (8, 16))):
        with pytest.raises(ValueError, match="three or more"):
            FeaturePyramid([4] * len(strides), strides, width=8, strides=bounds)
    with pytest.raises(ValueError, match="One stride a map"):
        FeaturePyramid([4], [4, 8])
