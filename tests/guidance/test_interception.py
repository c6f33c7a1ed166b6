"""Attention of which only the layout is told: its own forward with the softmax replaced."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn
from torch.nn import functional

from diffusers_repr import PAG, Denoiser, Family, guide
from diffusers_repr.denoiser.attention_layouts import PLAIN, SINGLE_TEXT_FIRST, TEXT_FIRST
from diffusers_repr.guidance.attention import perturbations
from diffusers_repr.guidance.attention.perturbations import Blur, Drop, Identity, Mask
from diffusers_repr.guidance.attention.received import attention_received
from tests.guidance.attention_cases import CASES, GRID, case, image_of, perturbed, same, supported

SEEN = [name for name in CASES if not any(part in name for part in ("first processor", "sliced", "own scale"))]
PERTURBED = [Identity(), Drop(), Blur(), Blur(0.8), Mask(0.5, seed=3)]


@pytest.mark.parametrize("name", SEEN)
def test_equals_the_parts_put_together(name):
    module, arguments, text = case(name)
    layout = replace(supported(module), processors={})
    for perturbation in PERTURBED:
        expected = perturbed(module, arguments, perturbation, GRID, text)
        image = image_of(module, arguments, text)
        found = perturbations.perturbed(module, layout, arguments, perturbation, GRID, image)
        assert same(found, expected, 1e-12)
        if image is not None:  # as places by row, the image at the end all the same
            places = torch.arange(image.start, image.stop).expand(3, -1)
            found = perturbations.perturbed(module, layout, arguments, perturbation, GRID, places)
            assert same(found, expected, 1e-12)


def test_attention_received_is_that_of_the_parts():
    for name in ("self, q and k normed", "self, masked", "spatial"):
        module, arguments, _ = case(name, torch.float32)
        expected = attention_received(module, supported(module), arguments)
        assert same(attention_received(module, PLAIN, arguments), expected, 1e-6)


class Grouped(nn.Module):
    """Text, image and padding in one stream; two heads share their keys; rows and columns of padding are masked."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.to_out = nn.Linear(8, 8)

    def forward(self, x, keep=None):
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (self.to_q, self.to_k, self.to_v))
        mask = None if keep is None else keep[:, None, None]
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
        return self.to_out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("perturbation", [*PERTURBED, Blur(1.1)])
@torch.no_grad()
def test_rows_with_text_of_other_lengths(perturbation):
    """Each row as if it were alone and without its padding; with a video's grid, too."""
    torch.manual_seed(0)
    module, texts, count = Grouped().double(), (3, 1, 5), 8
    x = torch.randn(3, 5 + count, 8, dtype=torch.float64)
    keep = torch.stack([torch.arange(13) < text + count for text in texts])
    places = torch.stack([torch.arange(text, text + count) for text in texts])
    for grid in ((2, 4), (2, 2, 2)):
        found = perturbations.perturbed(module, SINGLE_TEXT_FIRST, {"x": x, "keep": keep}, perturbation, grid, places)
        for at, text in enumerate(texts):
            row = {"x": x[at : at + 1, : text + count]}
            image = slice(text, text + count)
            alone = perturbations.perturbed(module, SINGLE_TEXT_FIRST, row, perturbation, grid, image)
            assert (found[at, : text + count] - alone[0]).abs().max() < 1e-12
    assert (alone - module(**row)).abs().max() > 1e-3
    padded = {"x": x[:2, :11], "keep": torch.arange(11).expand(2, -1) < 9}
    middle = perturbations.perturbed(module, SINGLE_TEXT_FIRST, padded, perturbation, (2, 4), slice(1, 9))
    whole = {"x": x[:2, :9]}
    expected = perturbations.perturbed(module, SINGLE_TEXT_FIRST, whole, perturbation, (2, 4), slice(1, 9))
    assert (middle[:, :9] - expected).abs().max() < 1e-12


def test_a_video_is_blurred_along_its_frames():
    module, x = Grouped().double(), torch.randn(1, 8, 8, dtype=torch.float64)
    frames = perturbations.perturbed(module, PLAIN, {"x": x}, Blur(1e-3), (2, 2, 2))
    assert same(frames, module(x), 1e-12)
    mean = perturbations.perturbed(module, PLAIN, {"x": x}, Blur(), None)
    assert same(perturbations.perturbed(module, PLAIN, {"x": x}, Blur(1e4), (2, 2, 2)), mean, 1e-12)


class Captioned(nn.Module):
    """Caption, image and padding in one stream, as many caption tokens as a row's mask says."""

    def __init__(self):
        super().__init__()
        self.patches, self.pixels = nn.Conv2d(1, 8, 1), nn.ConvTranspose2d(8, 1, 1)
        self.blocks = nn.ModuleList([Grouped(), Grouped(), Grouped()])

    def forward(self, sample, timestep, caption, caption_mask):
        image = self.patches(sample) + timestep.reshape(-1, 1, 1, 1) / 1000
        tokens, lengths = image.flatten(2).transpose(1, 2), caption_mask.sum(1)
        places = lengths[:, None] + torch.arange(tokens.shape[1])
        whole = caption.new_zeros(len(image), caption.shape[1] + tokens.shape[1], 8)
        whole[:, : caption.shape[1]] = caption * caption_mask[..., None]
        whole = whole.scatter(1, places[..., None].expand_as(tokens), tokens)
        keep = torch.arange(whole.shape[1]) < (lengths + tokens.shape[1])[:, None]
        for block in self.blocks:
            whole = whole + block(whole, keep)
        tokens = whole.gather(1, places[..., None].expand_as(tokens))
        return (self.pixels(tokens.transpose(1, 2).unflatten(2, image.shape[2:])),)


class CaptionedFamily(Family):
    attentions = {"blocks.*": replace(SINGLE_TEXT_FIRST, name="captioned attention")}

    def channels(self):
        return 1

    def grid(self, tokens, size):
        return size, tokens - size[0] * size[1]

    def image_tokens(self, layout, inputs, tokens):
        lengths = inputs["caption_mask"].sum(1, keepdim=True)
        return lengths + torch.arange(tokens - inputs["caption"].shape[1])


class SelfOrText(nn.Module):
    """`Grouped` with a mask of its own that leaves an image token itself and the caption: PAG, the long way."""

    def __init__(self, grouped, lengths, count):
        super().__init__()
        self.grouped, self.lengths, self.count = grouped, lengths, count

    def forward(self, x, keep):
        mask = keep[:, None, :].repeat(1, x.shape[1], 1)
        for row, length in enumerate(self.lengths.tolist()):
            image = slice(length, length + self.count)
            mask[row, image, image] = torch.eye(self.count, dtype=torch.bool)
        g = self.grouped
        q, k, v = (part(x).unflatten(-1, (-1, 4)).transpose(1, 2) for part in (g.to_q, g.to_k, g.to_v))
        scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~mask[:, None], -torch.inf)
        return g.to_out((scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_pag_of_a_family_of_ones_own_equals_a_loop_of_two_calls():
    torch.manual_seed(1)
    model = Captioned().eval()
    denoiser = Denoiser(model, DDIMScheduler(), family=CaptionedFamily())
    x = torch.randn(3, 1, 2, 3)
    mask = torch.arange(4) < torch.tensor([[3], [1], [4]])
    given = {"caption": torch.randn(3, 4, 8), "caption_mask": mask}
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(2)
    with guide(denoiser, PAG(2.0), scheduler=scheduler) as handle:
        got = model(x, scheduler.timesteps[:1].expand(3), **given)[0]
        scheduler.step(got, scheduler.timesteps[0], x)
    assert handle.stats.steps[0].acted == ["PAG"]
    t = scheduler.timesteps[:1].expand(3)
    plain = model(x, t, **given)[0]
    assert denoiser.default_layers("pag").layers == ("blocks.1",)
    model.blocks[1] = SelfOrText(model.blocks[1], mask.sum(1), 6)
    worse = model(x, t, **given)[0]
    torch.testing.assert_close(got, plain + 2.0 * (plain - worse))
    assert (plain - worse).abs().max() > 1e-3


class Calls(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, hidden_states, encoder_hidden_states=None):
        for _ in range(self.count):
            heads = hidden_states[:, None]
            functional.scaled_dot_product_attention(heads, heads, heads)
        return hidden_states


@pytest.mark.parametrize(
    ("count", "layout", "message"),
    [
        (0, PLAIN, "made 0 calls of scaled_dot_product_attention in a forward; one can be perturbed.$"),
        (2, PLAIN, "made 2 calls"),
        (1, TEXT_FIRST, "from 4 queries to 4 keys, and joint attention, text first has 6 of both.*attentions"),
        (1, SINGLE_TEXT_FIRST, "which are the image's must be told"),
    ],
)
def test_what_is_refused(count, layout, message):
    arguments = {"hidden_states": torch.randn(1, 4, 8), "encoder_hidden_states": torch.randn(1, 2, 8)}
    with pytest.raises(ValueError, match=message):
        perturbations.perturbed(Calls(count), layout, arguments, Identity())
