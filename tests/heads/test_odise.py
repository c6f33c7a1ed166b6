"""Parts of ODISE: what they are at the start, and their formulas written out."""

import pytest
import torch
from transformers import Mask2FormerModel

from diffusers_repr import Denoiser
from diffusers_repr.features.taps import find_taps, read_taps
from diffusers_repr.heads import OdiseHead
from diffusers_repr.heads.odise import FeaturePyramid, ImplicitCaptioner, MaskGenerator
from diffusers_repr.testing import check_head
from tests.heads.odise_cases import tiny_head, tiny_towers
from tests.testers.models import WIDTH, build

NEAR = {"rtol": 1e-3, "atol": 3e-4}  # batches of another size, through group norms


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


@pytest.mark.parametrize("strides", [[4, 8, 16, 32], [2, 4, 8]])
def test_masks_are_those_of_mask2former_on_the_same_maps(strides):
    torch.manual_seed(0)
    ours = MaskGenerator([16] * len(strides), strides, 32, 5, 2, 3, 2, 24, 40).eval()
    stock = Mask2FormerModel(ours.config).eval()

    class Backbone(torch.nn.Module):
        def forward(self, maps):
            return type("Maps", (), {"feature_maps": maps})

    level, transformer = stock.pixel_level_module, stock.transformer_module
    level.encoder, level.decoder = Backbone(), type(level.decoder)(ours.config, [16] * len(strides))
    level.decoder.load_state_dict(ours.pixel_decoder.state_dict())
    transformer.load_state_dict(ours.transformer.state_dict())
    maps = [torch.randn(2, 16, 64 // s, 96 // s, generator=seeded(s)) for s in strides]
    with torch.no_grad():
        found = ours(maps)
        pixels = level(maps)
        expected = transformer(pixels.decoder_hidden_states, pixels.decoder_last_hidden_state)
    assert len(found.masks) == len(found.queries) == 4  # before the first layer, and after each of three
    for ours_then, theirs in zip(found.masks, expected.masks_queries_logits, strict=True):
        assert torch.equal(ours_then, theirs)
    last = expected.intermediate_hidden_states[-1]
    assert torch.equal(found.queries[-1], last.transpose(0, 1))
    assert found.masks[-1].shape == (2, 5, 64 // strides[0], 96 // strides[0])


def test_generators_that_cannot_be():
    for channels, strides, width, message in (
        ([8] * 3, [4, 8, 32], 32, "Three or more"),
        ([8] * 2, [4, 8, 16], 32, "Three or more"),
        ([8] * 3, [4, 8, 16], 48, "multiple of 32"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskGenerator(channels, strides, width, 5, 1, 1, 2, 8, 8)


@pytest.fixture(scope="module")
def towers():
    return tiny_towers()


def test_a_head_reads_windows_trains_and_is_saved(sd, towers, tmp_path):
    head = tiny_head(sd, towers)
    assert head.pyramid.strides == [4, 8, 16]
    assert torch.equal(head.classifier.null.data, towers.embed_texts([""]))
    pixels, texts = torch.rand(2, 3, 32, 48, generator=seeded()) * 2 - 1, towers.embed_texts(["cat", "kitten", "dog"])
    levels = head.levels(sd, towers, pixels)
    assert [tuple(level.shape) for level in levels] == [(2, 32, 32 // s, 48 // s) for s in (4, 8, 16)]
    for whole, one in zip(levels, head.levels(sd, towers, pixels, batch_size=1), strict=True):
        torch.testing.assert_close(whole, one, **NEAR)
    left, right = (head.levels(sd, towers, part) for part in (pixels[..., :32], pixels[..., 16:]))
    for level, stride, a, b in zip(levels, head.pyramid.strides, left, right, strict=True):
        at = 16 // stride
        torch.testing.assert_close(level[..., :at], a[..., :at], **NEAR)
        torch.testing.assert_close(level[..., at : 2 * at], (a[..., at:] + b[..., :at]) / 2, **NEAR)
    found = head(levels, texts, [2, 1])
    assert found.masks[-1].shape == (2, 6, 8, 12)
    assert found.logits[-1].shape == (2, 6, 3)
    sum(value.square().mean() for value in (*found.masks, *found.logits)).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    assert all(p.grad is None for part in (sd.model, sd.vae, towers.model) for p in part.parameters())
    head.save_pretrained(tmp_path)
    again = OdiseHead.from_pretrained(tmp_path).eval()
    again.check_base(sd)
    with torch.no_grad():
        same = [made(made.levels(sd, towers, pixels), texts, [2, 1]).logits[-1] for made in (head.eval(), again)]
    assert torch.equal(*same)


def test_a_head_keeps_the_contract_of_heads(sd, towers, tmp_path):
    head, texts = tiny_head(sd, towers), towers.embed_texts(["cat", "kitten", "dog"])
    with torch.no_grad():
        levels = head.levels(sd, towers, torch.rand(2, 3, 32, 48, generator=seeded()) * 2 - 1)
    inputs = {"levels": levels, "texts": texts, "counts": [2, 1]}
    check_head(head, inputs, apart=("captioner", "pyramid"))  # which make the levels
    with pytest.raises(AssertionError, match="no gradient reaches.*captioner"):
        check_head(head, inputs)
    head.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):  # it stays in float32, whatever the base is in
        half = OdiseHead.from_pretrained(tmp_path, torch_dtype=dtype).eval()
        assert torch.equal(half(**inputs).logits[-1], head.eval()(**inputs).logits[-1])


def test_what_a_head_refuses(sd, towers):
    head = tiny_head(sd, towers)
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        head.check_base(Denoiser.from_pipe(build("ddpm")))
    with pytest.raises(ValueError, match="trained on"):
        head.check_base(Denoiser.from_pipe(build("sdxl")))
    with pytest.raises(ValueError, match="no whole cells of 16"):
        head.levels(sd, towers, torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="give levels of"):
        tiny_head(sd, towers, strides=(4, 8))
    with pytest.raises(TypeError, match="float32"):
        head.half()([], towers.embed_texts(["cat"]), [1])
