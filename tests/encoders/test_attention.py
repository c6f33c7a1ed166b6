import pytest
import torch
from torch import nn

from diffusers_repr.encoders import Encoder
from tests.encoders.test_pretrained import pixels_of
from tests.encoders.vits import MODELS, PREFIX, build, save


@pytest.mark.parametrize("name", sorted(MODELS))
def test_equals_eager_attention_over_the_patches(tmp_path, name):
    """By another route: the network's own eager probabilities, columns of other tokens dropped, rows normalised."""
    encoder = Encoder.from_pretrained(save(build(name), tmp_path / name))
    pixels, prefix = pixels_of(2, 3, 8, 12), PREFIX.get(name, 1)
    calls = []
    handle = encoder.module.register_forward_hook(lambda *_: calls.append(1))
    output, got = encoder.encode_with_attention(pixels, [2, 0, -2])
    handle.remove()
    assert len(calls) == 1
    plain = encoder.encode_pixels(pixels)
    assert torch.equal(output.tokens, plain.tokens)
    assert torch.equal(output.global_features, plain.global_features)
    eager = build(name)
    eager.set_attn_implementation("eager")
    inputs = encoder.source.family.inputs(encoder.module, encoder._prepare(pixels))
    if name == "vit_mae":
        eager.config.mask_ratio = 0.0
    with torch.no_grad():
        expected = eager(**inputs, output_attentions=True).attentions
    for layer, probabilities in zip((2, 0, 1), got, strict=True):
        assert probabilities.shape == (2, 2, 24, 24)
        patches = expected[layer][:, :, prefix:, prefix:]
        torch.testing.assert_close(probabilities, patches / patches.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 2, 24))
    assert (got[0] - got[1]).abs().max() > 1e-4
    assert encoder.module.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.module.modules() if "proj" in repr(m))


def test_order_and_bounds(tmp_path):
    encoder = Encoder.from_pretrained(save(build("dinov2"), tmp_path / "m"))
    pixels = pixels_of(1, 3, 8, 8)
    (_, last), (_, two) = (encoder.encode_with_attention(pixels, layers) for layers in ([-1], [1, 2]))
    assert torch.equal(last[0], two[1])
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        encoder.encode_with_attention(pixels, [3])
    early = Encoder.from_pretrained(tmp_path / "m", layer=1)
    assert torch.equal(early.encode_with_attention(pixels, [1])[1][0], two[0])
    with pytest.raises(ValueError, match=r"blocks \[1, 2\] only 1 are run"):
        early.encode_with_attention(pixels, [1, 2])


def test_other_networks_have_none():
    encoder = Encoder.from_module(nn.Conv2d(3, 4, 2, 2), patch_size=2)
    with pytest.raises(TypeError, match="attention of Conv2d is not known"):
        encoder.encode_with_attention(torch.zeros(1, 3, 4, 4), [0])
