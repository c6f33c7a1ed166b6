"""The whole library on a SiT: conditions, layers, features, attention, guidance under its pipeline."""

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler

from diffusers_repr import CFG, PAG, SAG, Denoiser, FeatureExtractor, guide, list_layers
from diffusers_repr.capture import capture, capture_attention
from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.denoiser.family_registry import family_by_name, list_families
from diffusers_repr.models import SiTTransformer2DModel

SCHEDULERS = {
    "ode": lambda: FlowMatchODEScheduler(),
    "heun": lambda: FlowMatchODEScheduler(solver="heun", path="cosine"),
    "sde": lambda: FlowMatchSDEScheduler(),
    "sde_cosine": lambda: FlowMatchSDEScheduler(path="cosine"),
    "euler": lambda: FlowMatchEulerDiscreteScheduler(),
}
LAYER = "blocks.1.attn"


def network(**changes):
    settings = {
        "sample_size": 8,
        "in_channels": 3,
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_classes": 10,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = SiTTransformer2DModel(**{**settings, **changes}).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def pipeline(scheduler="ode", **changes):
    pipe = SiTPipeline(network(**changes), SCHEDULERS[scheduler]())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Copies:
    """Attention in which each token sees itself alone: what PAG perturbs to."""

    def __call__(self, attn, hidden_states, **_):
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


def loop(pipe, labels, steps, velocity, seed=0, size=(8, 8)):
    """A sampler's loop with any velocity `(x, t, labels) -> u`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(labels), 3, *size, generator=generator)
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(steps)
    extra = {} if isinstance(scheduler, FlowMatchODEScheduler) else {"generator": generator}
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(velocity(x, t), t, x, **extra).prev_sample
    return x


def sample(pipe, labels, steps=4, seed=0, **call):
    generator = torch.Generator().manual_seed(seed)
    return pipe(labels, num_inference_steps=steps, generator=generator, output_type="latent", **call).images


# The family


def test_it_is_known():
    assert "SiTTransformer2DModel" in list_families()
    denoiser = Denoiser.from_pipe(pipeline("heun"))
    assert denoiser.schedule.kind == "cosine_flow"
    assert denoiser.image_size == (8, 8)
    for scheduler in ("ode", "euler"):
        assert Denoiser.from_pipe(pipeline(scheduler)).schedule.kind == "flow"


@pytest.mark.parametrize("size", [(8, 8), (8, 12)])
def test_predict_is_the_networks_call(size):
    pipe = pipeline("sde_cosine")
    denoiser = Denoiser.from_pipe(pipe)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = denoiser.predict(x, 300.5, denoiser.condition(class_labels=[4, 7]))
        wanted = pipe.transformer(x, 300.5, torch.tensor([4, 7])).sample
        null = denoiser.predict(x, 300.5, denoiser.condition(batch=2)).output
        assert torch.equal(null, pipe.transformer(x, 300.5).sample)
    assert torch.equal(got.velocity, wanted)
    quarter = math.pi / 2 * 0.3005
    torch.testing.assert_close(got.eps, math.sin(quarter) * x + math.cos(quarter) * wanted / (math.pi / 2))


def test_conditions():
    denoiser = Denoiser.from_pipe(pipeline())
    with pytest.raises(ValueError, match=r"class_labels must lie in 0..10 \(10 is the null class\); got \[11\]"):
        denoiser.condition(class_labels=11)
    with pytest.raises(ValueError, match="takes no prompt"):
        denoiser.condition("a cat")
    free = Denoiser.from_pipe(pipeline(num_classes=0))
    with pytest.raises(ValueError, match="has no classes"):
        free.condition(class_labels=1)
    x = torch.ones(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(free.predict(x, 500).output, free.model(x, 500).sample)
        vectors = Denoiser.from_pipe(pipeline(condition_dim=5))
        given = torch.randn(2, 5)
        condition = vectors.condition(embeddings={"condition": given})
        assert torch.equal(vectors.predict(x, 500, condition).output, vectors.model(x, 500, condition=given).sample)


def test_a_dit_checkpoints_form():
    """Noise and a learned variance, whole timesteps told as they are."""
    model = network(out_channels=6, time_divisor=1.0)
    denoiser = Denoiser(model, DDIMScheduler(clip_sample=False))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        raw = model(x, torch.tensor([400, 400]), torch.tensor([1, 2])).sample
        got = denoiser.predict(x, 400, denoiser.condition(class_labels=[1, 2]))
    assert torch.equal(got.eps, raw[:, :3])


def test_layers():
    layers = {layer.path: layer for layer in list_layers(Denoiser.from_pipe(pipeline()), (8, 12))}
    assert list(layers) == ["patch_embed", "blocks.0", "blocks.1", "blocks.2", "norm_out", "proj_out"]
    block = layers["blocks.1"]
    assert (block.kind, block.channels, block.grid, block.stride, block.text_tokens) == ("tokens", 16, (4, 6), 2, 0)
    assert layers["blocks.0"].flops_share < block.flops_share < layers["proj_out"].flops_share == 1
    vector = Denoiser.from_pipe(pipeline(condition_dim=5, num_classes=0))
    assert [layer.path for layer in list_layers(vector)] == list(layers)


def test_features():
    """What a hook sees at the noisy input; early exit; the same whatever the batch."""
    pipe = pipeline()
    denoiser = Denoiser.from_pipe(pipe)
    images = torch.rand(3, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    extractor = FeatureExtractor(denoiser, ["blocks.1"], timestep=200, image_size=(8, 12))
    calls = []
    handle = pipe.transformer.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    maps = extractor(images)["blocks.1"]
    handle.remove()
    assert not calls
    assert maps.shape == (3, 24, 16)
    torch.testing.assert_close(extractor(images[2:])["blocks.1"], maps[2:])
    clean = FeatureExtractor(denoiser, ["blocks.1"], timestep=200, noise="clean", image_size=(8, 12))(images)
    with torch.no_grad(), capture(pipe.transformer, "blocks.1") as tape:
        pipe.transformer(2 * images - 1, 200, torch.tensor([10] * 3))
    torch.testing.assert_close(clean["blocks.1"], tape["blocks.1"])


@pytest.mark.parametrize("fused", [False, True])
def test_attention_maps(fused):
    model = network(qk_norm=True)
    attn = model.blocks[1].attn
    if fused:
        model.fuse_qkv_projections()
    x, labels = torch.randn(2, 3, 8, 4), torch.tensor([1, 2])
    with torch.no_grad(), capture(model, LAYER, where="input") as taken:
        model(x, 300, labels)
    with torch.no_grad(), capture_attention(model, LAYER, heads=None) as tape:
        model(x, 300, labels)
    q, k = (layer(taken[LAYER]).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (attn.to_q, attn.to_k))
    wanted = (attn.norm_q(q) @ attn.norm_k(k).mT / 8**0.5).softmax(-1)
    torch.testing.assert_close(tape[LAYER], wanted)
    assert tape.tokens[LAYER].order == "self"


# Guidance


@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_cfg_and_pag_under_the_pipeline(scheduler):
    """Against a loop of its own: `u = null + s (cond - null) + w (cond - perturbed)`, at H != W."""
    pipe, labels, size = pipeline(scheduler), torch.tensor([1, 7]), (8, 12)
    other = copy.deepcopy(pipe.transformer)
    other.blocks[1].attn.set_processor(Copies())

    def velocity(x, t):
        cond, null = (pipe.transformer(x, t, y).sample for y in (labels, torch.full_like(labels, 10)))
        return null + 2.5 * (cond - null) + 1.5 * (cond - other(x, t, labels).sample)

    wanted = loop(pipe, labels, 4, velocity, size=size)
    given = {"height": 8, "width": 12, "guidance_scale": 4.0}
    with guide(pipe, [CFG(2.5), PAG(1.5, layers=LAYER)]) as handle:
        got = sample(pipe, labels, **given)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert {step.joined for step in handle.stats.steps} == {"blocks.1"}
    plain = sample(pipe, labels, height=8, width=12)
    assert (plain - wanted).abs().max() > 0.05
    # The pipeline's own guidance with PAG alone is the same.
    with guide(pipe, PAG(1.5, layers=LAYER)):
        torch.testing.assert_close(sample(pipe, labels, **{**given, "guidance_scale": 2.5}), got, rtol=1e-4, atol=1e-4)


def test_lanes_join_at_the_perturbed_block():
    pipe, labels = pipeline(), torch.tensor([1, 7, 3])
    rows = {}
    for at, block in enumerate(pipe.transformer.blocks):
        block.register_forward_hook(lambda _, args, out, at=at: rows.setdefault(at, []).append(len(out)))
    with guide(pipe, PAG(1.0, layers=LAYER)):
        sample(pipe, labels, steps=2, guidance_scale=3.0)
    assert rows == {0: [6, 6], 1: [9, 9], 2: [9, 9]}


def test_guidance_inside_an_interval():
    """Outside of it the pipeline calls the network with the conditional rows alone; PAG acts everywhere."""
    pipe, labels = pipeline(), torch.tensor([1, 7])
    other = copy.deepcopy(pipe.transformer)
    other.blocks[1].attn.set_processor(Copies())

    def velocity(x, t):
        u = cond = pipe.transformer(x, t, labels).sample
        if 300 <= t <= 800:
            null = pipe.transformer(x, t).sample
            u = null + 2.5 * (cond - null)
        return u + cond - other(x, t, labels).sample

    with guide(pipe, PAG(1.0, layers=LAYER)):
        got = sample(pipe, labels, steps=5, guidance_scale=2.5, guidance_interval=(0.3, 0.8))
    torch.testing.assert_close(got, loop(pipe, labels, 5, velocity), rtol=1e-4, atol=1e-4)


def test_without_classes_and_without_guidance_of_its_own():
    pipe = pipeline("sde", num_classes=0)
    other = copy.deepcopy(pipe.transformer)
    other.blocks[1].attn.set_processor(Copies())

    def velocity(x, t):
        cond = pipe.transformer(x, t).sample
        return cond + 2.0 * (cond - other(x, t).sample)

    with guide(pipe, PAG(2.0, layers=LAYER)):
        got = sample(pipe, None, batch_size=2)
    torch.testing.assert_close(got, loop(pipe, [0, 0], 4, velocity), rtol=1e-4, atol=1e-4)


def test_vector_condition():
    """The null half is told by the pipeline, not by labels."""
    pipe = pipeline(num_classes=0, condition_dim=5)
    given = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(pipe.transformer)
    other.blocks[1].attn.set_processor(Copies())

    def velocity(x, t):
        cond, null = (pipe.transformer(x, t, condition=c).sample for c in (given, None))
        return null + 2.5 * (cond - null) + cond - other(x, t, condition=given).sample

    with guide(pipe, [CFG(2.5), PAG(1.0, layers=LAYER)]):
        got = sample(pipe, None, condition=given, guidance_scale=2.0)
    torch.testing.assert_close(got, loop(pipe, [0, 0], 4, velocity), rtol=1e-4, atol=1e-4)


def test_pag_with_qk_norm_equals_its_own_mask():
    """Queries and keys are normed in a perturbation too: a mask that takes nothing away changes nothing."""
    from diffusers_repr.guidance.attention.perturbations import Mask
    from tests.guidance.attention_cases import perturbed

    attn, tokens = network(qk_norm=True).blocks[0].attn, torch.randn(2, 6, 16)
    torch.testing.assert_close(perturbed(attn, {"hidden_states": tokens}, Mask(ratio=0.0)), attn(tokens))


def test_default_layers():
    denoiser = Denoiser.from_pipe(pipeline())
    assert denoiser.family.self_attentions(denoiser.model) == [f"blocks.{at}.attn" for at in range(3)]
    assert denoiser.default_layers("pag").layers == (LAYER,)
    pipe = pipeline()
    with guide(pipe, [PAG(1.0), SAG(0.5)]) as handle:
        sample(pipe, torch.tensor([1]), steps=2)
    assert set(handle.stats.steps[0].acted) == {"PAG", "SAG"}


def test_fused_projections_are_guided_alike():
    images = []
    for fused in (False, True):
        pipe = pipeline()
        if fused:
            pipe.transformer.fuse_qkv_projections()
        with guide(pipe, PAG(1.0, layers=LAYER)):
            images.append(sample(pipe, torch.tensor([1]), steps=2))
    torch.testing.assert_close(*images, rtol=1e-5, atol=1e-5)


def test_a_loop_of_its_own():
    """guide(Denoiser) with CFG by a given null condition."""
    pipe, labels = pipeline(), torch.tensor([1, 7])
    denoiser = Denoiser.from_pipe(pipe)
    scheduler = FlowMatchODEScheduler()
    scheduler.set_timesteps(3)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), guide(denoiser, CFG(3.0), scheduler=scheduler, null=denoiser.condition()):
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.transformer(x, t, labels).sample, t, x).prev_sample

    def velocity(x, t):
        cond, null = pipe.transformer(x, t, labels).sample, pipe.transformer(x, t).sample
        return null + 3.0 * (cond - null)

    torch.testing.assert_close(x, loop(pipe, labels, 3, velocity), rtol=1e-4, atol=1e-4)


class _Foreign:
    """A pipeline that does not tell whether it guides."""


@pytest.mark.parametrize(
    ("labels", "cond", "null"),
    [
        ([1, 2, 10, 10], slice(0, 2), slice(2, 4)),
        ([10, 10, 1, 2], slice(2, 4), slice(0, 2)),
        ([1, 2, 3, 10], slice(0, 4), None),
        ([10, 10, 10, 10], slice(0, 4), None),
    ],
)
def test_lanes_of_other_pipelines(labels, cond, null):
    family = family_by_name("SiTTransformer2DModel").bound_to({"num_classes": 10, "in_channels": 3})
    x = torch.randn(2, 3, 8, 8).repeat(2, 1, 1, 1)
    inputs = {"hidden_states": x, "class_labels": torch.tensor(labels)}
    assert family.lanes(_Foreign(), inputs) == BatchLanes(cond, null)
    assert family.lanes(None, inputs) == BatchLanes(slice(0, 4))
    unequal = {**inputs, "hidden_states": torch.randn(4, 3, 8, 8)}
    assert family.lanes(_Foreign(), unequal) == BatchLanes(slice(0, 4))
