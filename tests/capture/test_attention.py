"""`capture_attention` against softmax(q k^T) in float64, from the layers' own weights and inputs."""

import math
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn

from diffusers_repr.capture import attention_layers, attention_memory, capture, capture_attention
from diffusers_repr.capture.attention import attention_probabilities
from diffusers_repr.denoiser import Denoiser
from tests.capture.models import hook_count, setting
from tests.testers.models import build

CASES = [
    ("sd", "down_blocks.1.attentions.0.transformer_blocks.0.attn1", "self"),
    ("sd", "up_blocks.1.attentions.2.transformer_blocks.0.attn2", "cross"),
    ("sdxl", "mid_block.attentions.0.transformer_blocks.1.attn2", "cross"),
    ("ddpm", "mid_block.attentions.0", "self"),
    ("ddpm", "up_blocks.1.attentions.1", "self"),
    ("dit", "transformer_blocks.1.attn1", "self"),
    ("pixart", "transformer_blocks.0.attn2", "cross"),
    ("sd3", "transformer_blocks.0.attn", "image_text"),
    ("sd3", "transformer_blocks.1.attn", "image_text"),
    ("flux", "transformer_blocks.1.attn", "text_image"),
    ("flux", "single_transformer_blocks.0.attn", "self"),
    ("sana", "transformer_blocks.1.attn2", "cross"),
]


def wide(projection, x):
    bias = 0 if projection.bias is None else projection.bias.double()
    return x.double() @ projection.weight.double().T + bias


def rms(norm, x):
    if norm is None:
        return x
    scaled = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return scaled if norm.weight is None else scaled * norm.weight.double()


def rotate(x, table):
    """(B, H, N, D) by the angles whose cosines and sines are given for each pair of channels."""
    cos, sin = (part.double() for part in table)
    turned = torch.empty_like(x)
    turned[..., 0::2] = x[..., 0::2] * cos[:, 0::2] - x[..., 1::2] * sin[:, 0::2]
    turned[..., 1::2] = x[..., 1::2] * cos[:, 1::2] + x[..., 0::2] * sin[:, 1::2]
    return turned


def oracle(model, inputs, path, order):
    """(B, H, N, M) by loops over samples, heads and rows, in float64."""
    module, seen = model.get_submodule(path), []
    handle = module.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    (args, kwargs), heads = seen[0], module.heads
    x = args[0] if args else kwargs["hidden_states"]
    text = kwargs.get("encoder_hidden_states")
    if x.ndim == 4:
        x = x.double().flatten(2).transpose(1, 2)
    if getattr(module, "group_norm", None) is not None:
        group = module.group_norm
        groups = x.transpose(1, 2).unflatten(1, (group.num_groups, -1)).flatten(2)
        groups = (groups - groups.mean(-1, keepdim=True)) / (
            groups.var(-1, keepdim=True, correction=0) + group.eps
        ).sqrt()
        x = groups.unflatten(2, (-1, x.shape[1])).flatten(1, 2).transpose(1, 2)
        x = x * group.weight.double() + group.bias.double()

    def split(value):
        return value.unflatten(-1, (heads, -1)).transpose(1, 2)

    q = rms(module.norm_q, split(wide(module.to_q, x)))
    k = rms(module.norm_k, split(wide(module.to_k, text if order == "cross" else x)))
    if order in ("image_text", "text_image"):
        q_text = rms(module.norm_added_q, split(wide(module.add_q_proj, text)))
        k_text = rms(module.norm_added_k, split(wide(module.add_k_proj, text)))
        image_first = order == "image_text"
        q = torch.cat([q, q_text] if image_first else [q_text, q], dim=2)
        k = torch.cat([k, k_text] if image_first else [k_text, k], dim=2)
    if kwargs.get("image_rotary_emb") is not None:
        q, k = rotate(q, kwargs["image_rotary_emb"]), rotate(k, kwargs["image_rotary_emb"])
    bias = kwargs.get("attention_mask")  # (B, 1, M), added
    out = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(heads):
            for row in range(q.shape[2]):
                scores = k[b, h] @ q[b, h, row] / math.sqrt(q.shape[-1])
                if bias is not None:
                    scores = scores + bias[b, 0].double()
                weights = (scores - scores.max()).exp()
                out[b, h, row] = weights / weights.sum()
    return out


@pytest.mark.parametrize(("name", "path", "order"), CASES)
def test_maps_equal_the_oracle(name, path, order):
    model, inputs, _ = setting(name)
    with torch.no_grad():
        with capture_attention(model, path) as mean:
            model(**inputs)
            pytest.fail("the forward went on after the last layer")
        with capture_attention(model, path, heads=None) as single:
            model(**inputs)
        expected = oracle(model, inputs, path, order)
    torch.testing.assert_close(single[path].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean[path].double(), expected.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mean[path].sum(-1), torch.ones(mean[path].shape[:2]))
    tokens = mean.tokens[path]
    assert tokens.order == order
    assert (tokens.heads, tokens.queries, tokens.keys) == expected.shape[1:]
    assert tokens.queries == tokens.image + (tokens.text if order in ("image_text", "text_image") else 0)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", ["sd", "ddpm", "sd3", "flux"])
def test_every_attention_of_a_model_and_its_untouched_output(name):
    model, inputs, _ = setting(name)
    paths = attention_layers(model)
    with torch.no_grad():
        plain = model(**inputs, return_dict=False)[0]
        with capture_attention(model, paths, stop_early=False) as tape:
            out = model(**inputs, return_dict=False)[0]
    assert torch.equal(out, plain)
    assert set(tape.features) == set(paths) == set(tape.tokens)
    for path in paths:
        torch.testing.assert_close(tape[path].sum(-1), torch.ones(tape[path].shape[:2]))


@pytest.mark.parametrize("heads", ["mean", None])
@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_chunks_change_nothing(heads, chunk):
    model, inputs, _ = setting("flux")
    path = "single_transformer_blocks.1.attn"
    with torch.no_grad():
        with capture_attention(model, path, heads) as plain:
            model(**inputs)
        with capture_attention(model, path, heads, chunk=chunk) as chunked:
            model(**inputs)
    torch.testing.assert_close(chunked[path], plain[path], rtol=1e-6, atol=1e-8)


def test_a_chunk_bounds_the_memory():
    class Largest(torch.overrides.TorchFunctionMode):
        bytes = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.bytes = max(self.bytes, out.nbytes)
            return out

    query, key = torch.randn(2, 1, 8, 256, 4).unbind()
    with Largest() as largest:
        out = attention_probabilities({"query": query, "key": key}, "mean", chunk=16)
    assert largest.bytes == max(out.nbytes, 8 * 16 * 256 * 4) == out.nbytes  # all heads: 8 times as much


@pytest.mark.parametrize("kind", [None, "bool", "float", "row", "causal", "grouped", "scale", "float16"])
def test_masks_scales_and_grouped_heads(kind):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 4, 6, 8, generator=generator)
    call = {"query": q, "key": k}
    if kind == "bool":
        call["attn_mask"] = torch.rand(2, 1, 5, 6, generator=generator) > 0.5
        call["attn_mask"][0, 0, 2] = False  # a row without a key
    elif kind == "float":
        call["attn_mask"] = torch.randn(5, 6, generator=generator)
    elif kind == "row":
        call["attn_mask"] = torch.randn(2, 1, 1, 6, generator=generator)
    elif kind == "causal":
        call["is_causal"] = True
    elif kind == "grouped":
        call |= {"key": k[:, :2], "enable_gqa": True}
    elif kind == "scale":
        call["scale"] = 0.3
    elif kind == "float16":
        call = {"query": q.half(), "key": k.half()}
    # a one-hot value matrix makes torch's own call return the probabilities
    value = torch.eye(6).expand(2, call["key"].shape[1], 6, 6).to(call["query"].dtype)
    expected = torch.nn.functional.scaled_dot_product_attention(**call, value=value)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if kind == "float16" else {"rtol": 1e-5, "atol": 1e-6}
    for chunk in (None, 2):
        found = attention_probabilities(call, None, chunk)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected.float(), **tolerance)
        torch.testing.assert_close(attention_probabilities(call, "mean", chunk), expected.float().mean(1), **tolerance)


def test_gradients_flow_through_the_maps():
    model, inputs, _ = setting("dit")
    x = inputs["hidden_states"].clone().requires_grad_()
    path = "transformer_blocks.1.attn1"
    gradients = []
    for chunk in (None, 10):
        with capture_attention(model, path, chunk=chunk) as tape:
            model(**{**inputs, "hidden_states": x})
        gradients.append(torch.autograd.grad(tape[path].square().sum(), x)[0])
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_transform_keeps_its_result_only():
    model, inputs, _ = setting("sd")
    paths = attention_layers(model)[:4]
    maps = []
    with (
        torch.no_grad(),
        capture_attention(model, paths, transform=lambda x, path: maps.append(weakref.ref(x)) or x.mean(-1)) as tape,
    ):
        model(**inputs)
    assert [ref() for ref in maps] == [None] * 4
    assert [tape[path].ndim for path in paths] == [2] * 4


def test_inside_a_capture_of_features():
    model, inputs, _ = setting("sd")
    attention = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    with torch.no_grad():
        with capture(model, ["mid_block", "up_blocks.1"]) as plain:
            model(**inputs)
        with capture(model, ["mid_block", "up_blocks.1"]) as features, capture_attention(model, attention) as maps:
            model(**inputs)
    assert torch.equal(features["up_blocks.1"], plain["up_blocks.1"])
    assert list(maps.features) == [attention]


# Errors


@pytest.mark.parametrize(
    ("name", "layers", "message"),
    [
        ("sana", "transformer_blocks.0.attn1", "SanaLinearAttnProcessor2_0.* Linear attention has no probabilities"),
        ("sd", "mid_block", "no attention. Closest: .*mid_block.attentions.0.transformer_blocks.0.attn1"),
        ("sd", "mid_block.attentions.0.transformer_blocks.0.attn3", "Closest: .*attn"),
        ("ddpm", "conv_in", "is a Conv2d, no attention"),
    ],
)
def test_layers_without_a_probability_matrix(name, layers, message):
    model, inputs, _ = setting(name)
    with pytest.raises(ValueError, match=message), torch.no_grad(), capture_attention(model, layers):
        model(**inputs)
    assert hook_count(model) == 0


class Double(nn.Module):
    """As processors of image prompts do: one call for the text, one for the image prompt."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        x = hidden_states[:, None]
        call = torch.nn.functional.scaled_dot_product_attention
        return (call(x, x, x) + call(x, x, x))[:, 0]


def test_processors_that_hide_or_double_their_call():
    model = nn.Sequential(Attention(8, heads=2, dim_head=4))
    model[0].set_processor(AttnProcessor())
    with (
        pytest.raises(ValueError, match=r"with AttnProcessor\) made no call .*set_processor\(AttnProcessor2_0\(\)\)"),
        capture_attention(model, "0"),
    ):
        model(torch.ones(1, 5, 8))
    model[0].scale_qk, model[0].scale = False, 1.0  # which the other processor does not ask
    with pytest.raises(ValueError, match=r"scaled_dot_product_attention\.$"), capture_attention(model, "0"):
        model(torch.ones(1, 5, 8))
    model[0].set_processor(Double())
    with (
        pytest.raises(ValueError, match="with Double.* more than one call"),
        capture_attention(model, "0", stop_early=False),
    ):
        model(torch.ones(1, 5, 8))


@pytest.mark.parametrize(("arguments", "message"), [({"heads": "max"}, "'mean' or None"), ({"chunk": 0}, "from 1")])
def test_bad_arguments(arguments, message):
    model, _, _ = setting("sd")
    with pytest.raises(ValueError, match=message), capture_attention(model, attention_layers(model)[0], **arguments):
        pytest.fail("the block was entered")


def test_too_much_memory_is_told():
    model, inputs, _ = setting("sd")
    paths = attention_layers(model)[:2]
    need = 2 * 4 * 384 * (384 + 77)
    with torch.no_grad():
        with (
            pytest.raises(MemoryError, match=r"need 0.00132 GiB up to .*attn2.* allows 0.00132 GiB.*transform="),
            capture_attention(model, paths, max_bytes=need - 1),
        ):
            model(**inputs)
        with capture_attention(model, paths, max_bytes=need) as tape:
            model(**inputs)
    assert sum(tape[path].nbytes for path in paths) == need
    # what the meta device foretells, at the size of the inputs
    denoiser = Denoiser.from_pipe(build("sd"))
    assert attention_memory(denoiser, paths, (32, 48), batch=2) == need
    assert attention_memory(denoiser, paths, (32, 48), batch=2, heads=None) == 2 * need
    with pytest.raises(ValueError, match="Linear attention"):
        attention_memory(Denoiser.from_pipe(build("sana")), "transformer_blocks.0.attn1")


def test_memory_of_a_model_of_real_size_without_its_weights():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    pipe = build("sd")
    denoiser = Denoiser(unet, pipe.scheduler)
    path = "up_blocks.3.attentions.2.transformer_blocks.0.attn1"
    assert attention_memory(denoiser, path, heads=None) == 8 * 4096 * 4096 * 4
