"""ReadoutGuidance: gradients against differences, steps, references, cost, what is left behind, bad input."""

import functools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import functional

from diffusers_repr import Denoiser, NoiseLevel, ReadoutGuidance, guide
from diffusers_repr.guidance.readout.base import resize_target
from diffusers_repr.heads import LinearHead
from tests.guidance.readout_cases import (
    AT,
    TARGET,
    bare,
    eps_gradient,
    gradient,
    hooks_of,
    images,
    normal,
    read,
    readout,
    seen_inputs,
    slope,
    stepped,
)
from tests.testers.models import build

# Gradients


@pytest.mark.parametrize("kind", ["spatial", "appearance", "correspondence"])
def test_gradient_against_central_differences(kind):
    denoiser, x = bare(), normal(2, 2, 16, 24)
    head = readout(denoiser, kind)
    x0, seed = normal(1, 2, 16, 24, seed=4), 11
    pairs = [((1, 2), (9, 20)), ((15, 0), (4, 4))]
    options = {
        "spatial": {"target": TARGET},
        "appearance": {"reference": x0, "seed": seed},
        "correspondence": {"reference": x0, "points": pairs, "seed": seed},
    }[kind]
    config = ReadoutGuidance(head, rescale=False, **options)
    noise = torch.randn(1, 2, 16, 24, generator=torch.Generator().manual_seed(seed)).double()
    level = denoiser.level(AT)
    other = read(denoiser, head, level.alpha * x0 + level.sigma * noise, AT).expand(2, -1, -1, -1)
    goal = functional.interpolate(TARGET[None, None].double(), (16, 24), mode="bilinear")

    def energy(x):
        r = read(denoiser, head, x, AT)
        if kind == "spatial":
            return float((r - goal).square().mean((1, 2, 3)).sum())
        if kind == "appearance":
            return float((1 - functional.cosine_similarity(r, other)).mean((1, 2)).sum())
        parts = []
        for p, q in pairs:
            there, here = (functional.cosine_similarity(other[..., p[0], p[1]], r[..., i, j]) for i, j in (q, p))
            parts.append((here + 1) / 4 - (there + 1) / 4)
        return float(torch.stack(parts).mean(0).sum())

    found, stats = eps_gradient(denoiser, config, x)
    ways, expected = slope(energy, x)
    along = (ways * found.flatten()).sum(1)
    assert expected.abs().min() > 1e-7
    torch.testing.assert_close(along, expected, rtol=1e-6, atol=0)
    lanes = 1 + (kind != "spatial")
    assert (stats.lanes, stats.passes, stats.backward_passes) == (lanes, lanes, 1)


def test_the_range_of_the_latents_scales_the_loss_and_is_constant():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    head = readout(denoiser, label_range=(-0.5, 1.0))
    config = ReadoutGuidance(head, TARGET.clamp(-0.5, 0.8))
    scaled, _ = eps_gradient(denoiser, config, x)
    plain, _ = eps_gradient(denoiser, config.replace(rescale=False), x)
    factor = ((x.amax((1, 2, 3)) - x.amin((1, 2, 3))) / 1.5).square()[:, None, None, None]
    torch.testing.assert_close(scaled, plain * factor, rtol=1e-7, atol=1e-12)


def test_samples_do_not_depend_on_their_batch():
    denoiser, x = bare(), normal(3, 2, 16, 24)
    head = readout(denoiser, "appearance")
    config = ReadoutGuidance(head, reference=normal(2, 16, 24, seed=4))
    whole, _ = eps_gradient(denoiser, config, x)
    alone, _ = eps_gradient(denoiser, config, x[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-6, atol=1e-12)


def test_the_head_is_told_the_timestep_of_the_level():
    denoiser, x = bare(), normal(1, 2, 16, 24)
    head, told = readout(denoiser), []
    head.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    eps_gradient(denoiser, ReadoutGuidance(head, TARGET), x, at=250)
    assert told == [250.0]


def test_a_target_for_each_sample_and_a_mask():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    head = readout(denoiser)
    targets = normal(2, 1, 16, 24, seed=5).clamp(-1, 1)
    both, _ = eps_gradient(denoiser, ReadoutGuidance(head, targets), x)
    for n in range(2):
        alone, _ = eps_gradient(denoiser, ReadoutGuidance(head, targets[n]), x[n : n + 1])
        torch.testing.assert_close(both[n : n + 1], alone, rtol=1e-6, atol=1e-12)
    mask = torch.zeros(16, 24)
    mask[4:8] = 1
    found, _ = eps_gradient(denoiser, ReadoutGuidance(head, targets, mask=mask, rescale=False), x)
    expected = gradient(
        denoiser,
        head.config["layers"],
        lambda maps: (head(maps, AT) - targets)[:, :, 4:8].square().mean((1, 2, 3)),
        x,
        AT,
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


# Steps on the latents


def test_sign_and_adam_steps():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    config = ReadoutGuidance(readout(denoiser), TARGET, scale=0.03)
    assert config.update == "latent_sign"
    g, _ = eps_gradient(denoiser, config, x)
    assert g.abs().min() > 0
    torch.testing.assert_close(seen_inputs(denoiser, config, x), x - 0.03 * g.sign(), rtol=0, atol=1e-12)
    leaf = torch.nn.Parameter(x.clone())
    leaf.grad = g
    torch.optim.Adam([leaf], lr=0.03).step()
    adam = seen_inputs(denoiser, config.replace(update="latent_adam"), x)
    torch.testing.assert_close(adam, leaf.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("update", ["latent_sign", "latent_adam"])
def test_a_step_lowers_the_loss(update):
    denoiser, x = bare(), normal(2, 2, 16, 24)
    head = readout(denoiser)
    goal = resize_target(TARGET[None, None].double(), (16, 24))

    def loss(x):
        return (read(denoiser, head, x, AT) - goal).square().mean((1, 2, 3))

    moved = seen_inputs(denoiser, ReadoutGuidance(head, TARGET, scale=1e-3, update=update), x)
    assert bool((loss(moved) < loss(x)).all())


# The reference


def test_a_reference_among_the_samples_is_not_moved():
    denoiser, x = bare(), normal(3, 2, 16, 24)
    head = readout(denoiser, "appearance")
    config = ReadoutGuidance(head, reference_row=1, rescale=False)
    found, stats = eps_gradient(denoiser, config, x)
    other = read(denoiser, head, x[1:2], AT)

    def loss(maps):
        return (1 - functional.cosine_similarity(head(maps, AT), other)).mean((1, 2))

    expected = gradient(denoiser, head.config["layers"], loss, x, AT)
    keep = torch.tensor([0, 2])
    torch.testing.assert_close(found[keep], expected[keep], rtol=1e-6, atol=1e-12)
    assert found[1].abs().max() <= 1e-14 * found[keep].abs().max()  # some processors' convolutions round a zero
    assert (stats.lanes, stats.passes, stats.backward_passes) == (1, 1, 1)
    moved = seen_inputs(denoiser, config.replace(scale=0.1), x)
    assert torch.equal(moved[1], x[1])
    assert float((moved[keep] - x[keep]).abs().min()) == pytest.approx(0.1)


def test_a_whole_run_leaves_the_reference_row_as_it_is():
    pipe = build("sd")
    head = readout(Denoiser.from_pipe(pipe), "correspondence")
    config = ReadoutGuidance(head, reference_row=0, points=[((2, 2), (10, 15))], scale=0.2)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    plain = images(pipe, "sd", 2, 1.0, steps=2, generator=[g.clone_state() for g in generators])
    with guide(pipe, config):
        guided = images(pipe, "sd", 2, 1.0, steps=2, generator=generators)
    torch.testing.assert_close(plain[0], plain[1], rtol=0, atol=1e-4)
    assert torch.equal(guided[0], plain[0])
    assert (guided[1] - plain[1]).abs().max() > 1e-2


def test_the_reference_lane_stops_after_the_last_layer_and_keeps_no_graph():
    denoiser, x = bare(), normal(1, 2, 16, 24)
    layer = "up_blocks.1.resnets.0.conv2"
    head = readout(denoiser, "appearance", [layer])
    ends, rows, graph = [], [], []
    denoiser.model.conv_out.register_forward_hook(lambda *args: ends.append(1))

    def keep(module, args, out):
        rows.append(len(out))
        graph.append(out.requires_grad)

    hook = denoiser.model.get_submodule(layer).register_forward_hook(keep)
    x0 = normal(2, 16, 24, seed=4)
    config = ReadoutGuidance(head, reference=x0)
    with torch.no_grad(), guide(denoiser, config, scheduler=stepped(denoiser)) as handle:
        denoiser.model(x, AT)
    hook.remove()
    assert graph == [False, True, False]  # reference, gradient, the call's own
    assert rows == [1, 1, 1]
    assert len(ends) == 1
    step = handle.stats.steps[0]
    assert (step.lanes, step.passes, step.backward_passes) == (3, 3, 1)


# Cost, and being off


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_lanes_and_passes(guidance_scale):
    pipe = build("sd")
    head, lanes = readout(Denoiser.from_pipe(pipe)), 1 + (guidance_scale > 1)
    with guide(pipe, ReadoutGuidance(head, TARGET)) as handle:
        images(pipe, "sd", 1, guidance_scale, steps=1)
    for step in handle.stats.steps:
        assert (step.lanes, step.passes, step.backward_passes) == (1 + lanes, 2, 1)
    with guide(pipe, ReadoutGuidance(head, TARGET, scale=5.0, update="eps")) as handle:
        images(pipe, "sd", 1, guidance_scale, steps=1)
    for step in handle.stats.steps:
        assert (step.lanes, step.passes, step.backward_passes) == (lanes, lanes, 1)


def test_acts_at_the_levels_that_the_head_has_seen():
    pipe = build("ddim")
    denoiser = Denoiser.from_pipe(pipe)
    head = readout(denoiser, level_range=(0, 600))
    target = TARGET[:, :6]  # square, as the samples
    config = ReadoutGuidance(head, target)

    def acted(config):
        with guide(pipe, config) as handle:
            images(pipe, "ddim", steps=10)
        return [float(step.level.timestep) for step in handle.stats.steps if step.backward_passes]

    assert acted(config) == [600, 500, 400, 300, 200, 100, 0]
    assert acted(config.replace(interval=(450, 850))) == [800, 700, 600, 500]
    assert acted(ReadoutGuidance(readout(denoiser), target)) == list(range(900, -1, -100))


# What is left behind


def state(denoiser, head):
    parts = [*denoiser.model.modules(), *head.modules()]
    flags = [p.requires_grad for part in (denoiser.model, head) for p in part.parameters()]
    grads = [p.grad is None for part in (denoiser.model, head) for p in part.parameters()]
    modes = [part.training for part in parts]
    return flags, grads, modes, hooks_of(denoiser.model), torch.is_grad_enabled(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("where", ["head", "reference", "network", "nowhere"])
def test_everything_is_restored(where):
    denoiser = bare()
    head = readout(denoiser, "appearance")
    head.train()
    next(head.parameters()).requires_grad_(False)
    before = state(denoiser, head)
    broken = {"head": head.blocks[0].conv_mid, "network": denoiser.model.conv_out}.get(where)
    told = []

    def fail(module, args):
        told.append(1)
        if where != "head" or len(told) == 2:  # the first call reads the reference
            raise KeyError("broken")

    if where == "head":
        head.register_forward_pre_hook(fail)
    elif broken is not None:
        broken_hook = broken.register_forward_pre_hook(fail)
    x0 = normal(2, 16, 24 if where != "reference" else 16, seed=4)
    config = ReadoutGuidance(head, reference=x0)
    x = normal(1, 2, 16, 24)
    if where == "nowhere":
        with guide(denoiser, config, scheduler=stepped(denoiser)):
            denoiser.model(x, AT)
    else:
        with (
            pytest.raises(ValueError if where == "reference" else KeyError),
            guide(denoiser, config, scheduler=stepped(denoiser)),
        ):
            denoiser.model(x, AT)
    if where == "network":
        broken_hook.remove()
    assert state(denoiser, head) == before


# Bad input


def test_a_head_of_another_base_is_refused():
    pipe = build("ddim")
    scheduler_step = pipe.scheduler.step
    head = readout(bare(3, torch.float32, block_out_channels=(8, 16, 24), norm_num_groups=8))
    with pytest.raises(ValueError, match="Wrong base for this ReadoutHead"):
        guide(pipe, ReadoutGuidance(head, TARGET))
    assert hooks_of(pipe.unet) == 0
    assert pipe.scheduler.step == scheduler_step
    other = DDIMScheduler(beta_start=0.01, beta_end=0.05)
    with pytest.raises(ValueError, match="has the noise process vp.*was trained on vp.*another noise"):
        guide(Denoiser(pipe.unet, other), ReadoutGuidance(readout(Denoiser.from_pipe(pipe)), TARGET))


@functools.cache
def single(kind):
    """A head in single precision, for settings that it shall refuse."""
    return readout(bare(dtype=torch.float32), kind)


SPATIAL, LOOKS, PLACES = "spatial", "appearance", "correspondence"
X0 = torch.zeros(2, 16, 24)
PAIR = [((0, 0), (1, 1))]


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        (SPATIAL, {}, "needs target"),
        (SPATIAL, {"target": TARGET, "reference": X0}, "takes no reference; it takes mask, reference_row, target"),
        (SPATIAL, {"target": TARGET, "pooled": True}, "takes no pooled"),
        (SPATIAL, {"target": 100 * TARGET}, r"spans -80 to 80; this head's labels lie in \[-1, 1\]"),
        (SPATIAL, {"target": torch.zeros(3, 8, 8)}, r"\(1, H, W\) or \(B, 1, H, W\); got \(3, 8, 8\)"),
        (SPATIAL, {"target": torch.zeros(8)}, r"got \(8,\)"),
        (SPATIAL, {"target": torch.full((4, 4), torch.nan)}, "not finite"),
        (SPATIAL, {"target": TARGET, "mask": torch.zeros(4, 4)}, "0 everywhere"),
        (SPATIAL, {"target": TARGET, "mask": 2 * torch.ones(4, 4)}, r"lie in \[0, 1\]"),
        (SPATIAL, {"target": TARGET, "mask": torch.ones(4)}, r"got \(4,\)"),
        (SPATIAL, {"target": TARGET, "update": "adam"}, "latent_adam"),
        (SPATIAL, {"target": TARGET, "scale": math.inf}, "finite"),
        (LOOKS, {}, "needs reference or reference_row"),
        (LOOKS, {"reference": X0, "reference_row": 0}, "not both"),
        (LOOKS, {"reference": X0[0]}, r"\(C, h, w\)"),
        (LOOKS, {"reference_row": -1}, "from 0; got -1"),
        (LOOKS, {"reference": X0, "target": TARGET}, "takes no target"),
        (LOOKS, {"reference": X0, "boxes": ((0, 0, 1, 1), (2, 2, 2, 3))}, "top < bottom"),
        (LOOKS, {"reference": X0, "boxes": ((0, 0, 1, 1), (0, 0, 0.5, 1))}, "whole pixels"),
        (LOOKS, {"reference": X0, "boxes": ((0, 0, 1, 1),)}, "must be two"),
        (LOOKS, {"reference": X0, "pooled": True, "mask": torch.ones(4, 4)}, "without boxes and pooled"),
        (PLACES, {"reference": X0}, "needs points"),
        (PLACES, {"reference": X0, "points": []}, "pairs"),
        (PLACES, {"reference": X0, "points": [((0, 0), (1, -1))]}, "from 0"),
        (PLACES, {"reference": X0, "points": [((0, 0), (1.5, 1))]}, "whole pixels"),
        (PLACES, {"reference": X0, "points": [(0, 0)]}, "A point"),
    ],
)
def test_bad_settings(kind, options, what):
    with pytest.raises(ValueError, match=what):
        ReadoutGuidance(single(kind), **options)


def test_no_head_on_maps():
    with pytest.raises(TypeError, match="ReadoutHead.from_pretrained"):
        ReadoutGuidance(LinearHead(2, 3), TARGET)


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        (SPATIAL, {"target": torch.zeros(3, 1, 8, 8)}, "target has 3 rows for 2 samples"),
        (SPATIAL, {"target": TARGET, "mask": torch.ones(3, 8, 8)}, "mask has 3 rows"),
        (LOOKS, {"reference": torch.zeros(3, 16, 24)}, "denoiser.encode"),
        (LOOKS, {"reference": torch.zeros(3, 2, 16, 24)}, "one for all samples, or one each"),
        (LOOKS, {"reference_row": 2}, "batch of 2"),
        (LOOKS, {"reference": X0, "boxes": ((0, 0, 1, 1), (0, 0, 17, 2))}, "16 x 24"),
        (PLACES, {"reference": X0, "points": [*PAIR, ((0, 24), (16, 0))]}, r"\[\(0, 24\), \(16, 0\)\].* 16 x 24"),
    ],
)
def test_what_does_not_fit_the_call(kind, options, what):
    denoiser = bare()
    config = ReadoutGuidance(readout(denoiser, kind), **options)
    with torch.no_grad(), guide(denoiser, config, scheduler=stepped(denoiser)), pytest.raises(ValueError, match=what):
        denoiser.model(normal(2, 2, 16, 24), AT)
    assert hooks_of(denoiser.model) == 0


def test_settings_are_changed_by_making_others():
    head = readout(bare(dtype=torch.float32))
    config = ReadoutGuidance(head, TARGET, mask=torch.ones(2, 4, 4), interval=(NoiseLevel(nsr=0.1), NoiseLevel(nsr=2)))
    other = config.replace(scale=0.5)
    assert (other.scale, config.scale) == (0.5, 0.02)
    assert torch.equal(other.target, config.target)
    assert torch.equal(other.mask, config.mask)
    assert config.kind == "spatial"
