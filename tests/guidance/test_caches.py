"""Under diffusers' caches of activations each lane is as a network of its own with a cache of its own."""

import copy

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffusers_repr import PAG, guide
from tests.guidance.test_families import FAMILIES, image_tokens, latents, lively
from tests.testers.families import network_of, own_image_token_alone
from tests.testers.models import build

STEPS = 5


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep,
        spatial_attention_timestep_skip_range=(-1, 1001),
    )  # fmt: skip


KINDS = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.6),
    "broadcast": broadcast,
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
    "mag": lambda pipe: MagCacheConfig(
        threshold=0.5, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS
    ),
}
LAYERS = {
    "chroma": ("transformer_blocks.1.attn", "single_transformer_blocks.1.attn"),
    "hunyuan_image": ("transformer_blocks.0.attn", "single_transformer_blocks.1.attn"),
    "cogview4": ("transformer_blocks.1.attn1",),
    "qwen_image": ("transformer_blocks.1.attn",),
    "flux": ("transformer_blocks.1.attn", "single_transformer_blocks.1.attn"),
}


def made(name):
    return lively(name) if name in FAMILIES else build(name)


def sampled(pipe, name, **more):
    if name in FAMILIES:
        return latents(pipe, name, **{"num_inference_steps": STEPS, **more})
    call = {"prompt": "a cat", "height": 32, "width": 48, "guidance_scale": 1.0, "num_inference_steps": STEPS}
    return pipe(**call, **more, generator=torch.Generator().manual_seed(0), output_type="latent").images


def two_networks(pipe, config, scale, paths, image, last):
    """The pipeline's network gives `cond + scale (cond - perturbed)`; the second is a copy with its own cache.

    A second call at a level (the null condition's) gets the correction of the first.
    """
    network = network_of(pipe)
    other, plain, seen = copy.deepcopy(network), network.forward, []
    for one in (network, other):
        one.enable_cache(config(pipe))

    def forward(*args, **kwargs):
        level = kwargs["timestep"].flatten()[0].item()
        out = plain(*args, **kwargs)[0]
        if not seen or seen[-1][0] != level:
            with own_image_token_alone(other, paths, image, last), other.cache_context("lane"):
                seen.append((level, scale * (out - other(*args, **kwargs)[0])))
        return (out + seen[-1][1],)

    network.forward = forward


def compare(name, kind, **call):
    config, paths = KINDS[kind], LAYERS[name]
    ours, theirs = made(name), made(name)
    if name == "hunyuan_image":
        for pipe in (ours, theirs):
            pipe.guider._enabled = False
    with guide(ours, PAG(3.0, layers=paths)):
        uncached = sampled(ours, name, **call)
    image = image_tokens(name) if name in FAMILIES else 2 * 3 * 4
    two_networks(theirs, config, 3.0, paths, image, name != "hunyuan_image")
    wanted = sampled(theirs, name, **call)
    network_of(ours).enable_cache(config(ours))
    plain = sampled(ours, name, **call)
    with guide(ours, PAG(3.0, layers=paths)) as handle:
        found = [sampled(ours, name, **call) for _ in range(2)]
    assert handle.stats.passes == (2 if "negative_prompt" not in call else 3) * STEPS
    assert (wanted - uncached).abs().max() > 1e-3  # the cache is in use
    assert (wanted - plain).abs().max() > 1e-3
    assert (found[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.equal(*found)  # a run begins with empty caches
    assert torch.equal(sampled(ours, name, **call), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_each_lane_has_a_cache_of_its_own(kind):
    compare("qwen_image", kind, **FAMILIES["qwen_image"].off)
