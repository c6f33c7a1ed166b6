"""Under caches of activations each lane is as a network of its own with a cache of its own."""

import copy
from dataclasses import dataclass

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_taylorseer_cache

from diffusers_repr import CFG, PAG, SAG, AutoGuidance, ClassifierGuidance, EnergyGuidance, guide
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.guidance.base import Guidance, GuidanceTerm
from tests.guidance.test_families import FAMILIES, image_tokens, latents, lively
from tests.testers.families import network_of, own_image_token_alone
from tests.testers.guidance import noise
from tests.testers.hosts import newer
from tests.testers.models import build

STEPS = 5


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep,
        spatial_attention_timestep_skip_range=(-1, 1001),
    )  # fmt: skip


KINDS = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=2.0),
    "broadcast": broadcast,
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32
    ),
    "mag": lambda pipe: newer("diffusers", "MagCacheConfig")(
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


def tokens_of(pipe, size):
    denoiser = Denoiser.from_pipe(pipe)
    h, w = denoiser.latent_size(size)
    return h * w // denoiser.family.multiple() ** 2


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
    image = image_tokens(name) if name in FAMILIES else tokens_of(ours, (32, 48))
    two_networks(theirs, config, 3.0, paths, image, name != "hunyuan_image")
    wanted = sampled(theirs, name, **call)
    network_of(ours).enable_cache(config(ours))
    plain = sampled(ours, name, **call)
    with guide(ours, PAG(3.0, layers=paths)) as handle:
        found = [sampled(ours, name, **call) for _ in range(2)]
    assert handle.stats.passes == len(handle.stats.steps) + STEPS
    assert (wanted - uncached).abs().max() > 1e-3  # the cache is in use
    assert (wanted - plain).abs().max() > 1e-3
    assert (found[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.equal(*found)  # a run begins with empty caches
    assert torch.equal(sampled(ours, name, **call), plain)


@pytest.mark.parametrize(
    "kind",
    ["first block", "broadcast", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("taylorseer", "mag"))],
)
def test_each_lane_has_a_cache_of_its_own(kind):
    compare("qwen_image", kind, **FAMILIES["qwen_image"].off)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["flux", "cogview4", "hunyuan_image"])
def test_each_lane_of_other_families(name, kind):
    if (name, kind) == ("cogview4", "taylorseer"):
        pytest.skip("its patterns fit no attention there: nothing is cached")
    compare(name, kind, **({} if name == "flux" else FAMILIES[name].off))


def test_beside_classifier_free_guidance_by_two_calls():
    """The null condition's cache is the pipeline's own; the correction is the first call's."""
    compare("cogview4", "first block", **FAMILIES["cogview4"].guided, **FAMILIES["cogview4"].null)


def loop(network, step, x):
    """Four steps of `x - 0.1 out`, at falling times; the network's own cache is emptied first."""
    network._reset_stateful_cache()
    for t in (900, 700, 500, 300):
        x = x - 0.1 * step(x, t)
    return x


@torch.no_grad()
def test_cfg_of_a_loop_and_a_weaker_network():
    """`null=` is a pass with a cache of its own; so has the weaker network, which no pipeline names a context for."""
    pipe = build("flux")
    denoiser, config = Denoiser.from_pipe(pipe), FirstBlockCacheConfig(threshold=2.0)
    cond, null = (denoiser.condition(prompt=text, size=(32, 32)) for text in ("a cat", ""))
    x = noise(1, 4, 16, 16)
    model, weaker = denoiser.model, copy.deepcopy(denoiser.model)
    for parameter in weaker.parameters():
        parameter.mul_(0.9)
    copies = [copy.deepcopy(each) for each in (model, model, weaker)]
    for one in (model, weaker, *copies):
        one.enable_cache(config)

    def predict(network, x, t, condition):
        with network.cache_context("cond"):
            return Denoiser(network, pipe.scheduler).predict(x, t, condition).output

    def by_hand(x, t):
        c, n, w = (predict(one, x, t, each) for one, each in zip(copies, (cond, null, cond), strict=True))
        return n + 3.0 * (c - n) + 2.0 * (c - w)

    wanted = loop(model, by_hand, x)
    plain = [loop(model, lambda x, t: predict(model, x, t, cond), x) for _ in range(2)]
    assert torch.equal(*plain)
    with guide(denoiser, [CFG(3.0), AutoGuidance(weaker, scale=2.0)], null=null):
        found = [loop(model, lambda x, t: predict(model, x, t, cond), x) for _ in range(2)]
    assert (wanted - plain[0]).abs().max() > 1e-3
    assert (found[0] - wanted).abs().max() < 1e-5
    assert torch.equal(*found)  # where the noise rises a run begins, with empty caches
    for one in (model, weaker):
        one.disable_cache()
    with guide(denoiser, [CFG(3.0), AutoGuidance(weaker, scale=2.0)], null=null):
        uncached = loop(model, lambda x, t: predict(model, x, t, cond), x)
    assert (uncached - wanted).abs().max() > 1e-4


def reads(features, x0, condition):
    return x0.mean(dim=(1, 2, 3))


def test_what_is_refused_beside_a_cache():
    pipe = build("flux")
    pipe.transformer.enable_cache(KINDS["first block"](pipe))
    with pytest.raises(ValueError, match=r"differentiates through activations.*call its disable_cache\(\) first"):
        guide(pipe, EnergyGuidance(reads, x0=True))
    pipe.transformer.disable_cache()
    guide(pipe, EnergyGuidance(reads, x0=True)).remove()  # as the message says
    config = FasterCacheConfig(
        current_timestep_callback=lambda: 1, attention_weight_callback=lambda module: 0.5, is_guidance_distilled=True
    )
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="what faster_cache keeps cannot be kept apart for the further pass of PAG"):
        guide(pipe, PAG(3.0))
    constant = ClassifierGuidance(lambda x, timestep: x.mean(dim=(2, 3)), 1, scale=1.0)
    guide(pipe, constant).remove()  # the network is not run for it
    pipe = lively("hunyuan_dit")
    apply_taylorseer_cache(pipe.transformer, TaylorSeerCacheConfig(cache_identifiers=["blocks.*attn1"]))
    with pytest.raises(ValueError, match="SAG reads attention that is not computed in every step; remove its hooks"):
        guide(pipe, SAG(1.0))


class Twice(GuidanceTerm):
    """A term of a user's that runs the network twice more."""

    def correction(self, step):
        rows = step.call.batch.cond
        return step.run(rows, x=0.9 * step.x(rows)) - step.run(rows, x=0.8 * step.x(rows))


@dataclass(frozen=True)
class Smaller(Guidance):
    def bind(self, denoiser):
        return Twice(self, denoiser)


@torch.no_grad()
def test_passes_of_a_users_own_term():
    """Each has a cache of its own, the same from step to step."""
    denoiser = Denoiser.from_pipe(build("flux"))
    model, cond, x = denoiser.model, denoiser.condition(prompt="a cat", size=(32, 32)), noise(1, 4, 16, 16)
    copies = [copy.deepcopy(model) for _ in range(3)]
    for one in (model, *copies):
        one.enable_cache(FirstBlockCacheConfig(threshold=2.0))

    def predict(network, x, t):
        with network.cache_context("cond"):
            return Denoiser(network, denoiser.scheduler).predict(x, t, cond).output

    def by_hand(x, t):
        out, *others = (predict(one, scale * x, t) for one, scale in zip(copies, (1, 0.9, 0.8), strict=True))
        return out + 2.0 * (others[0] - others[1])

    wanted = loop(model, by_hand, x)
    with guide(denoiser, Smaller(scale=2.0)):
        found = loop(model, lambda x, t: predict(model, x, t), x)
    assert (found - wanted).abs().max() < 1e-5
    assert (found - loop(model, lambda x, t: predict(model, x, t), x)).abs().max() > 1e-3
