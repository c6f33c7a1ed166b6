"""Keys and values of a condition that stays are made once, bit for bit, and nothing else is touched."""

import threading

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

from diffusers_repr.capture.key_values import cached_key_values, can_cache


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=2, cross_attention_dim=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 2, 8, 8, seed=7)


@torch.no_grad()
def run(unet, tokens, t=3):
    return unet(X, t, encoder_hidden_states=tokens).sample


def forwards(unet):
    return [path for path, module in unet.named_modules() if "forward" in module.__dict__]


def test_bit_equal_and_computed_once(unet):
    tokens = randn(2, 3, 6)
    want = [run(unet, tokens, t) for t in (9, 5, 1)]
    calls = []
    layers = [m for p, m in unet.named_modules() if p.endswith("attn2.to_k") or p.endswith("attn2.to_v")]
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    try:
        with cached_key_values(unet) as cache:
            got = [run(unet, tokens, t) for t in (9, 5, 1)]
    finally:
        for handle in handles:
            handle.remove()
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert len(cache.layers) == len(layers) == cache.computed
    assert cache.reused == 2 * len(layers)
    assert forwards(unet) == []


def test_another_condition_is_computed(unet):
    """Other tensors of equal values, rows, and what was written in place: known by what the network gives."""
    tokens, other = randn(2, 3, 6), randn(2, 3, 6, seed=1)
    want, wanted = run(unet, tokens), run(unet, other)
    with cached_key_values(unet) as cache:
        assert torch.equal(run(unet, tokens), want)
        assert torch.equal(run(unet, other), wanted)
        assert torch.equal(run(unet, tokens.clone()), want)
        assert torch.equal(run(unet, tokens), want)
        assert cache.reused == len(cache.layers)
        tokens.copy_(other)
        assert torch.equal(run(unet, tokens), wanted)
        assert cache.reused == len(cache.layers)


def test_gradients_reach_the_condition(unet):
    tokens = randn(2, 3, 6).requires_grad_()
    with cached_key_values(unet) as cache:
        run(unet, tokens)
        kept = cache.computed
        unet(X, 3, encoder_hidden_states=tokens).sample.sum().backward()
        assert cache.reused == 0
    assert cache.computed == kept
    assert float(tokens.grad.abs().max()) > 0
    unet.zero_grad()


def test_nothing_is_kept_of_what_is_gone(unet):
    with cached_key_values(unet) as cache:
        for seed in range(3):
            run(unet, randn(2, 3, 6, seed=seed))
        kept = [m.forward for m in unet.modules() if "forward" in m.__dict__]
        assert cache.reused == 0
        runs = [
            run for stand_in in kept for runs in stand_in.__dict__["_diffusers_repr_runs"].values() for run in runs
        ]
        assert {len(one.entries) for one in runs} == {1}


def test_threads_do_not_mix(unet):
    """Two runs on one network, each with its condition, entered and left across one another."""
    conditions = [randn(2, 3, 6, seed=seed) for seed in (1, 2)]
    want = [run(unet, tokens) for tokens in conditions]
    both, got = threading.Barrier(2, timeout=60), [[], []]

    def work(at):
        with cached_key_values(unet) as cache:
            for _ in range(3):
                both.wait()
                got[at].append(run(unet, conditions[at]))
        assert cache.reused == 2 * len(cache.layers)
        got[at].append(run(unet, conditions[at]))

    threads = [threading.Thread(target=work, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in (0, 1):
        assert len(got[at]) == 4
        assert all(torch.equal(one, want[at]) for one in got[at])
    assert forwards(unet) == []


def test_refused(unet):
    plain = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                        up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    assert can_cache(unet)
    assert not can_cache(plain)
    with pytest.raises(ValueError, match="no cross-attention"), cached_key_values(plain):
        pass
    compiled = torch.compile(unet)
    assert not can_cache(compiled)
    with pytest.raises(RuntimeError, match="compiled"), cached_key_values(compiled):
        pass
