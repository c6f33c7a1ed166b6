"""Guidance by activations: the total derivative against finite differences, what moves where, what is left behind."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from diffusers_repr.capture import encode_partial
from diffusers_repr.guidance.activations import steer, total_gradients
from diffusers_repr.heads import JointHead
from tests.testers.models import unet2d

LABELS = torch.tensor([2, 0])


def make(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    unet = unet2d(2, **changes).to(dtype).eval()
    return unet, JointHead.for_unet(unet, 3).to(dtype).eval()


def inputs(dtype=torch.float64):
    x = torch.randn(2, 2, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype), torch.tensor([300, 700])


def cross_entropy(unet, head, x, t, path=None, change=None):
    """CE_sum with `change` added to what the layer at `path` returns, seen by all that comes after it."""
    handles = []
    if path is not None:

        def add(module, args, output):
            if isinstance(output, tuple):  # a stage: its output is its last skip
                return output[0] + change, (*output[1][:-1], output[1][-1] + change)
            return output + change

        handles.append(unet.get_submodule(path).register_forward_hook(add))
    with torch.no_grad():
        found = encode_partial(unet, x, t)
        value = F.cross_entropy(head.classify(found), LABELS, reduction="sum")
    for handle in handles:
        handle.remove()
    return float(value)


@pytest.mark.parametrize(
    ("path", "place"), [("conv_in", 1), ("down_blocks.0", 3), ("down_blocks.1", 5), ("mid_block", 0)]
)
def test_the_gradient_is_the_total_one(path, place):
    """Central differences of the whole rest of the encoder and the head, in float64."""
    unet, head = make()
    x, t = inputs()
    found = encode_partial(unet, x.requires_grad_(True), t)
    parts = [found.hidden, *found.skips]
    gradient = total_gradients(head, parts, t, LABELS)[place]
    step = 1e-5
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = torch.randn(parts[place].shape, generator=generator, dtype=torch.float64)
        ends = [cross_entropy(unet, head, x.detach(), t, path, sign * step * direction) for sign in (1, -1)]
        assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5)
    # the head's own inputs alone would give another
    leaves = [part.detach().requires_grad_(True) for part in parts]
    direct = torch.autograd.grad(F.cross_entropy(head(leaves[0], leaves[1:], t), LABELS, reduction="sum"), leaves)
    assert (place == 0) == torch.allclose(direct[place], gradient)


def test_equals_autograd():
    unet, head = make()
    x, t = inputs()
    found = encode_partial(unet, x, t)
    parts = [found.hidden, *found.skips]
    loss = F.cross_entropy(head.classify(found), LABELS, reduction="sum")
    want = torch.autograd.grad(loss, parts, retain_graph=True)
    for a, b in zip(total_gradients(head, parts, t, LABELS), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("normalization", ["none", "relative"])
def test_what_is_decoded(normalization):
    """By the encoder and the decoder called block by block."""
    unet, head = make()
    x, t = inputs()
    found = encode_partial(unet, x, t)
    parts = [found.hidden, *found.skips]
    loss = F.cross_entropy(head.classify(found), LABELS, reduction="sum")
    gradients = torch.autograd.grad(loss, parts)
    scale = torch.full((2,), 4.0, dtype=torch.float64)
    if normalization == "relative":
        length, slope = ([sum(p[row].square().sum().item() for p in side) ** 0.5 for row in range(2)]
                         for side in (parts, gradients))  # fmt: skip
        scale = torch.tensor([0.1 * a / b for a, b in zip(length, slope, strict=True)], dtype=torch.float64)
    hidden, *skips = (p.detach() + scale.view(-1, 1, 1, 1) * g for p, g in zip(parts, gradients, strict=True))
    with torch.no_grad():
        emb = unet.time_embedding(unet.time_proj(t).double())
        for block in unet.up_blocks:
            count = len(block.resnets)
            hidden = block(hidden, tuple(skips[-count:]), emb)
            skips = skips[:-count]
        want = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        with steer(unet, head, LABELS, 0.1 if normalization == "relative" else 4.0, normalization) as steering:
            got = unet(x, t).sample
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    assert steering.calls == 1
    if normalization == "relative":
        moved = sum(
            float((s * g[0]).square().sum()) for s, g in zip(scale[:1].expand(len(parts)), gradients, strict=True)
        )
        assert moved**0.5 == pytest.approx(0.1 * length[0])


def test_scale_0_is_the_network():
    unet, head = make(torch.float32)
    x, t = inputs(torch.float32)
    with torch.no_grad():
        want = unet(x, t).sample
        with steer(unet, head, LABELS, 0.0):
            assert torch.equal(unet(x, t).sample, want)
        with steer(unet, head, LABELS, 50.0) as steering:
            moved = unet(x, t, return_dict=False)[0]
            steering.scale = 0.0
            assert torch.equal(unet(sample=x, timestep=t).sample, want)
        assert (moved - want).abs().max() > 1e-3
        assert torch.equal(unet(x, t).sample, want)


def state(*modules):
    return [(p.requires_grad, p.grad) for m in modules for p in m.parameters()], [
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for top in modules for m in top.modules()
    ]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("where", ["nowhere", "head", "decoder", "encoder"])
def test_leaves_everything_as_it_was(where, grad):
    unet, head = make(torch.float32)
    head.train()
    next(unet.parameters()).requires_grad_(False)
    broken = {"head": head, "decoder": unet.up_blocks[0], "encoder": unet.down_blocks[1]}.get(where)
    before = state(unet, head)
    x, t = inputs(torch.float32)

    def fail(module, args, kwargs):
        raise RuntimeError(f"in the {where}")

    with torch.set_grad_enabled(grad):
        handle = None if broken is None else broken.register_forward_pre_hook(fail, with_kwargs=True)
        if where == "nowhere":
            with steer(unet, head, LABELS, 3.0):
                out = unet(x, t).sample
            assert not out.requires_grad
        else:
            with pytest.raises(RuntimeError, match=f"in the {where}"), steer(unet, head, LABELS, 3.0):
                unet(x, t)
            handle.remove()
        assert torch.is_grad_enabled() == grad
    assert state(unet, head) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    unet, head = make(torch.float32)
    x, t = inputs(torch.float32)
    results = []
    for kind in (torch.float32, dtype):
        unet.to(kind)
        with torch.no_grad(), steer(unet, head.to(kind), LABELS, 20.0):
            steered = unet(x.to(kind), t).sample
        with torch.no_grad():
            results.append((steered - unet(x.to(kind), t).sample).float())
    assert F.cosine_similarity(*(r.flatten() for r in results), dim=0) > 0.98


def test_any_pipeline_and_offload():
    unet, head = make(torch.float32)
    pipe = DDPMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe(2, generator, num_inference_steps=3, output_type="np").images)

    plain = run()
    with steer(unet, head, LABELS, 20.0) as steering:
        steered = run()
    assert steering.calls == 3
    assert not torch.equal(steered, plain)
    assert torch.equal(run(), plain)
    cpu_offload(unet, torch.device("cpu"))
    with torch.no_grad(), steer(unet, head, LABELS, 20.0):
        x, t = inputs(torch.float32)
        offloaded = unet(x, t).sample
    fresh, _ = make(torch.float32)
    with torch.no_grad(), steer(fresh, head, LABELS, 20.0):
        assert torch.equal(fresh(x, t).sample, offloaded)


def test_what_is_refused():
    unet, head = make(torch.float32)
    x, t = inputs(torch.float32)
    for settings, message in (
        ({"scale": float("inf")}, "must be finite"),
        ({"scale": 1.0, "normalization": "sigma"}, "one of none, relative"),
    ):
        with pytest.raises(ValueError, match=message), steer(unet, head, LABELS, **settings):
            pass
    with pytest.raises(ValueError, match="called with 1 rows and steered to 2"), steer(unet, head, LABELS, 1.0):
        unet(x[:1], t[:1])
    with pytest.raises(ValueError, match=r"must lie in 0\.\.2; got \[3, 1\]"), steer(unet, head, LABELS + 1, 1.0):
        unet(x, t)
    with pytest.raises(RuntimeError, match="was not called inside the block"), steer(unet, head, LABELS, 1.0):
        pass
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode(), steer(unet, head, LABELS, 1.0):
        unet(x, t)
    with pytest.raises(TypeError, match="has no conv_in"), steer(nn.Linear(1, 1), head, LABELS, 1.0):
        pass
    apply_group_offloading(unet, torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match="group offloading replaces"), steer(unet, head, LABELS, 1.0):
        pass
