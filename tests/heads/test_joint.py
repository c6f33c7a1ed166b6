"""The split U-Net and the head on its encoder: bitwise equalities, a plain reference, features that are constant."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DModel
from torch import nn

from diffusers_repr.capture import bottleneck, decode_partial, encode_partial
from diffusers_repr.heads import JointHead
from tests.testers.models import unet2d

SKIP = {
    "block_out_channels": (8, 16),
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
UNETS = {
    "attention": {},
    "two layers": {"layers_per_block": 2},
    "classes": {"num_class_embeds": 4},
    "fourier": {"time_embedding_type": "fourier"},
    "skip blocks": SKIP,
    "resnet sampling": {
        "down_block_types": ("ResnetDownsampleBlock2D",) * 3,
        "up_block_types": ("ResnetUpsampleBlock2D",) * 3,
    },
}


def make(name="attention", seed=0, **changes) -> UNet2DModel:
    torch.manual_seed(seed)
    return unet2d(2, **UNETS[name] | changes).eval()


def inputs(name="attention"):
    labels = {"class_labels": torch.tensor([1, 3])} if name == "classes" else {}
    x = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(1))
    return {"sample": x, "timestep": torch.tensor([3, 700]), **labels}


@pytest.mark.parametrize("name", [name for name in UNETS if name != "skip blocks"])
def test_decode_of_encode_is_the_network(name):
    unet, given = make(name), inputs(name)
    features = encode_partial(unet, **given)
    assert torch.equal(decode_partial(unet, features), unet(**given).sample)
    whole = encode_partial(unet, **given, stop_early=False)
    assert all(
        torch.equal(a, b)
        for a, b in zip((features.hidden, *features.skips), (whole.hidden, *whole.skips), strict=True)
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_blocks_that_pass_the_image_on_too():
    """Their smallest group norm has 32 groups."""
    torch.manual_seed(0)
    wide = {"block_out_channels": (32, 32), "norm_num_groups": 32, "sample_size": 8}
    unet = unet2d(3, **SKIP | wide).eval()
    x = torch.randn(2, 3, 8, 8)
    features = encode_partial(unet, x, 10)
    assert torch.equal(decode_partial(unet, features), unet(x, 10).sample)


def test_the_encoder_is_that_of_a_loop_over_its_blocks():
    unet, given = make("two layers"), inputs()
    features = encode_partial(unet, **given)
    emb = unet.time_embedding(unet.time_proj(given["timestep"]))
    h = unet.conv_in(given["sample"])
    skips = [h]
    for block in unet.down_blocks:
        h, more = block(h, emb)
        skips += more
    assert len(skips) == len(features.skips)
    assert all(torch.equal(a, b) for a, b in zip(skips, features.skips, strict=True))
    assert torch.equal(unet.mid_block(h, emb), features.hidden)
    for block in reversed(unet.up_blocks):  # as many as the decoder takes
        skips = skips[: -len(block.resnets)]
    assert not skips


def test_the_decoder_is_not_run():
    unet, called = make(), []
    unet.up_blocks[0].register_forward_pre_hook(lambda *_: called.append("up"))
    unet.mid_block.register_forward_pre_hook(lambda *_: called.append("mid"))
    encode_partial(unet, **inputs())
    assert called == ["mid"]


@pytest.mark.parametrize("name", ["attention", "two layers"])
def test_what_is_decoded_may_be_changed(name):
    """Against the decoder called block by block."""
    unet, given = make(name), inputs()
    features = encode_partial(unet, **given)
    hidden, skips = 2 * features.hidden, [s + i for i, s in enumerate(features.skips)]
    with bottleneck(unet, lambda h, s: (2 * h, [part + i for i, part in enumerate(s)])):
        got = unet(**given).sample
    emb = unet.time_embedding(unet.time_proj(given["timestep"]))
    for block in unet.up_blocks:
        count = len(block.resnets)
        hidden = block(hidden, tuple(skips[-count:]), emb)
        skips = skips[:-count]
    assert torch.equal(got, unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden))))
    assert (got - unet(**given).sample).abs().max() > 1e-3
    with bottleneck(unet, lambda h, s: None):
        assert torch.equal(unet(**given).sample, unet(**given, return_dict=False)[0])


def test_gradients_pass_through_both_halves():
    unet, given = make(), inputs()
    features = encode_partial(unet, **given)
    decode_partial(unet, features).square().sum().backward()
    through = [p.grad.clone() for p in unet.parameters()]
    unet.zero_grad()
    unet(**given).sample.square().sum().backward()
    for a, p in zip(through, unet.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_offloaded_weights_go_back_after_an_early_exit():
    unet = make()
    want = encode_partial(unet, **inputs())
    cpu_offload(unet, torch.device("cpu"))
    got = encode_partial(unet, **inputs())
    assert torch.equal(got.hidden, want.hidden)
    assert {p.device.type for p in unet.parameters()} == {"meta"}


def test_networks_without_halves_are_refused():
    with pytest.raises(TypeError, match="Linear has no conv_in, down_blocks, mid_block, up_blocks"):
        encode_partial(nn.Linear(1, 1), torch.ones(1, 1), 0)
    with pytest.raises(TypeError, match="UNet2DModel has no mid_block"):
        encode_partial(make(mid_block_type=None), **inputs())
    unet = make()
    with (
        pytest.raises(ValueError, match="takes activations of the shapes"),
        bottleneck(unet, lambda h, s: (h, s[:-1])),
    ):
        unet(**inputs())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    unet._compiled_call_impl = unet.forward  # what `unet.compile()` sets, without the compiler
    with pytest.raises(RuntimeError, match="train without torch_compile"):
        encode_partial(unet, **inputs())


# --- the head


@pytest.mark.parametrize("name", ["attention", "two layers", "resnet sampling"])
def test_counts_the_channels_of_the_encoder(name):
    unet = make(name).train()
    state = torch.get_rng_state()
    head = JointHead.for_unet(unet, 5, dropout=0.0, hidden_features=7)
    assert unet.training
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        same = JointHead(head.config.in_features, 5, dropout=0.0, hidden_features=7)
    assert torch.equal(head.linear1.weight, same.linear1.weight)
    features = encode_partial(unet, **inputs())
    assert head.classify(features).shape == (2, 5)
    assert head.config.in_features == sum(p.shape[1] for p in (features.hidden, *features.skips))
    with pytest.raises(ValueError, match="gave 16. Make it by JointHead.for_unet"):
        head(features.hidden, [], 0)


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("time", [True, False])
def test_equals_its_formula(norm, time):
    torch.manual_seed(0)
    head = JointHead(5, 3, hidden_features=4, norm=norm, time_feature=time, dropout=0.5).double().eval()
    with torch.no_grad():
        for tensor in (*head.parameters(), *head.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    hidden, skips, times = torch.randn(2, 3, 2, 2).double(), [torch.randn(2, 2, 4, 3).double()], [0, 500]
    p = {**dict(head.named_parameters()), **dict(head.named_buffers())}

    def normed(x, name):
        if norm == "none":
            return x
        if norm == "layer":
            mean, var = x.mean(), x.var(unbiased=False)
        else:
            mean, var = p[f"{name}.running_mean"], p[f"{name}.running_var"]
        return (x - mean) / (var + 1e-5).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    got = head(hidden, skips, torch.tensor(times))
    for row in range(2):
        x = torch.cat([hidden[row].flatten(1).mean(1), skips[0][row].flatten(1).mean(1)])
        x = normed(x, "norm1")
        if time:
            x = torch.cat([x, torch.tensor([times[row] / 1000]).double()])
        x = p["linear1.weight"] @ x + p["linear1.bias"]
        x = normed(torch.where(x > 0, x, 0.01 * x), "norm2")
        torch.testing.assert_close(got[row], p["linear2.weight"] @ x + p["linear2.bias"])


@pytest.mark.parametrize("first", [False, True])
def test_dropout_before_or_behind_the_norm(first):
    """The paper's code drops first; written out with the same draws, in training."""
    torch.manual_seed(0)
    head = JointHead(6, 3, norm="batch", time_feature=False, dropout=0.5, dropout_first=first)
    hidden = torch.randn(8, 6, 1, 1)
    state = torch.get_rng_state()
    got = head(hidden, [], 0)
    torch.set_rng_state(state)
    x = hidden[..., 0, 0]
    for linear in (head.linear1, head.linear2):
        drop = nn.functional.dropout(torch.ones_like(x), 0.5)
        x = x * drop if first else x
        x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
        x = linear(x if first else x * drop)
        x = nn.functional.leaky_relu(x) if linear is head.linear1 else x
    torch.testing.assert_close(got, x)


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_timestep_that_was_constant_in_training_blows_nothing_up(norm):
    torch.manual_seed(0)
    head = JointHead(12, 3, norm=norm, dropout=0.1)
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2)
    for _ in range(200):
        hidden, y = torch.randn(32, 8, 2, 2), torch.randint(0, 3, (32,))
        hidden[:, 0] += y[:, None, None]
        loss = nn.functional.cross_entropy(head(hidden, [torch.randn(32, 4, 4, 4)], 0), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    head.eval()
    with torch.no_grad():
        given = (torch.randn(16, 8, 2, 2), [torch.randn(16, 4, 4, 4)])
        apart = (head(*given, 999) - head(*given, 0)).abs().max()
    assert torch.isfinite(apart)
    assert apart < 10


def test_the_papers_code_would_blow_up():
    """What the head avoids: batch norm of a feature that is 0 in training."""
    norm = nn.BatchNorm1d(1)
    for _ in range(200):
        norm(torch.zeros(8, 1))
    assert norm.eval()(torch.full((1, 1), 999.0)).item() > 1e5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    for norm in ("layer", "batch"):
        torch.manual_seed(0)
        head = JointHead(6, 3, norm=norm, dropout=0.3).eval()
        hidden, skips = torch.randn(2, 2, 4, 4), [torch.randn(2, 4, 8, 8)]
        low = JointHead(6, 3, norm=norm, dropout=0.3).eval()
        low.load_state_dict(head.state_dict())
        low.to(dtype)
        got = low(hidden.to(dtype), [s.to(dtype) for s in skips], 100)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, head(hidden, skips, 100), atol=0.02, rtol=0.02)
    with pytest.raises(ValueError, match="trained in float32"):
        low.train()(hidden, skips, 100)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    head, given = JointHead(6, 3, dropout=0.5), (torch.randn(2, 6, 2, 2), [], 0)
    assert not torch.equal(head(*given), head(*given))
    head.eval()
    assert torch.equal(head(*given), head(*given))


def test_saved_and_loaded(tmp_path):
    head = JointHead(6, 3, norm="batch", id2label={0: "a", 1: "b", 2: "c"}).eval()
    head.save_pretrained(tmp_path)
    again = JointHead.from_pretrained(tmp_path)
    given = (torch.randn(2, 6, 2, 2), [], 0)
    assert torch.equal(again(*given), head(*given))
    assert again.labels == ["a", "b", "c"]
    assert JointHead(6, 2).labels == ["0", "1"]


def test_bad_settings():
    for settings, message in (
        ({"in_features": 0}, "in_features must be a whole number"),
        ({"num_classes": True}, "num_classes must be a whole number"),
        ({"norm": "group"}, "one of layer, batch, none"),
        ({"dropout": 1.0}, "below 1"),
        ({"time_divisor": 0.0}, "above 0"),
        ({"id2label": ["a"]}, "must name the ids 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            JointHead(**{"in_features": 4, "num_classes": 2} | settings)
    with pytest.raises(ValueError, match="3 timesteps for 2 samples"):
        JointHead(4, 2)(torch.ones(2, 4, 1, 1), [], torch.arange(3))
