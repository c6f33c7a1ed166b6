"""Readout guidance as the published code runs it: whole runs against a loop of it, several heads as one step."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn import functional

from diffusers_repr import Denoiser, ReadoutGuidance, SummedReadoutGuidance, guide
from diffusers_repr.heads import readout_layers
from diffusers_repr.heads.convert import convert_readout
from tests.guidance.readout_cases import AT, TARGET, bare, eps_gradient, images, normal, readout, seen_inputs, stepped
from tests.heads.published import IDXS, checkpoint, embedded, forward
from tests.testers.models import build

SIZE, SCALE, RATE, STEPS = (8, 12), 4.0, 0.02, 3
PIXELS = {"height": 16, "width": 24}
POINTS = [((2, 3), (4, 9)), ((7, 11), (1, 2))]


def double(name="sd"):
    pipe = build(name)
    for part in (pipe.unet, pipe.text_encoder):
        part.double()
    pipe.scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    return pipe


def loss_of(kind, state, maps, unet, timestep, x, target):
    """The published losses of maps of two rows, the reference and the guided one."""
    embedding = None if kind == "correspondence" else embedded(unet, timestep)
    other = forward(state, [value[:1].detach() for value in maps], embedding)
    read = forward(state, [value[1:] for value in maps], embedding)
    low, high = float(x.detach().min()), float(x.detach().max())  # of both rows
    if kind == "spatial":

        def normal(y):
            return (y + 1) / 2 * (high - low) + low

        return functional.mse_loss(normal(read), functional.interpolate(normal(target), SIZE))
    if kind == "appearance":
        return (1 - functional.cosine_similarity(read, other)).mean() * (high - low) ** 2
    unit = [value / value.norm(dim=1, keepdim=True) for value in (other, read)]

    def similar(p, q):
        return ((unit[0][0, :, p[0], p[1]] * unit[1][0, :, q[0], q[1]]).sum() + 1) / 2

    moved = torch.stack([similar(p, q) for p, q in POINTS]).mean()
    stayed = torch.stack([similar(p, p) for p, _ in POINTS]).mean()
    return -moved / 2 + stayed / 2


def published_run(pipe, heads, latents, recurrent, eta, target):
    """The loop of the published code: heads are (kind, state dict, weight)."""
    unet, scheduler = pipe.unet, copy.deepcopy(pipe.scheduler)
    with torch.no_grad():
        cond, null = pipe.encode_prompt(["a cat"] * 2, "cpu", 1, True)
    context, kept = torch.cat([null, cond]), {}
    layers = [readout_layers(unet)[at] for at in IDXS]
    hooks = [
        unet.get_submodule(path).register_forward_hook(lambda m, a, out, path=path: kept.update({path: out}))
        for path in layers
    ]
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for step, t in enumerate(scheduler.timesteps):
        if step < STEPS - 1:
            x = torch.nn.Parameter(latents.clone())
            optimizer = torch.optim.AdamW([x], lr=RATE, weight_decay=0.0)
            for _ in range(recurrent):
                unet(torch.cat([x, x]), t, context)
                maps = [functional.interpolate(kept[path], SIZE, mode="bilinear") for path in layers]
                loss = 0
                for rows in (slice(0, 2), slice(2, 4)):
                    for kind, state, weight in heads:
                        own = [value[rows] for value in maps]
                        loss = loss + weight * loss_of(kind, state, own, unet, int(t), x, target)
                (x.grad,) = torch.autograd.grad(loss, x)
                optimizer.step()
            latents = x.detach()
        with torch.no_grad():
            without, with_condition = unet(torch.cat([latents, latents]), t, context).sample.chunk(2)
        eps = without + SCALE * (with_condition - without)
        before = int(scheduler.timesteps[step + 1]) if step + 1 < STEPS else -1
        now, after = (
            scheduler.alphas_cumprod[at] if at >= 0 else scheduler.final_alpha_cumprod for at in (int(t), before)
        )
        sigma = eta * ((1 - now / after) * (1 - after) / (1 - now)).sqrt()
        x0 = (latents - (1 - now).sqrt() * eps) / now.sqrt()
        latents = after.sqrt() * x0 + (1 - after - sigma**2).sqrt() * eps
        if eta:
            noise = [torch.randn(1, *latents.shape[1:], generator=g, dtype=latents.dtype) for g in generators]
            latents = latents + sigma * torch.cat(noise)
    for hook in hooks:
        hook.remove()
    return latents


@pytest.mark.parametrize(
    ("kinds", "recurrent", "eta"), [(("appearance", "correspondence"), 2, 0.0), (("spatial",), 1, 1.0)]
)
def test_a_whole_run_is_that_of_the_published_code(kinds, recurrent, eta):
    pipe = double()
    denoiser = Denoiser.from_pipe(pipe)
    target = normal(1, 3, 10, 15, seed=6).clamp(-1, 1)
    settings = {
        "spatial": {"target": target},
        "appearance": {},
        "correspondence": {"points": POINTS},
    }
    parts, heads = [], []
    for at, kind in enumerate(kinds):
        held, weight = checkpoint(denoiser, kind, seed=at), (0.7, 1.5)[at]
        head, _ = convert_readout(held, denoiser)
        parts.append(ReadoutGuidance(head.double(), reference_row=0, weight=weight, **settings[kind]))
        heads.append((kind, held["aggregation_network"], weight))
    config = SummedReadoutGuidance(parts, published=True, steps=recurrent, interval=(300, 999))
    latents = normal(1, 4, *SIZE).expand(2, -1, -1, -1)

    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    options = {"latents": latents.clone(), "eta": eta, "generator": generators, "negative_prompt": "", **PIXELS}
    with guide(pipe, config) as handle:
        found = images(pipe, "sd", 2, SCALE, steps=STEPS, **options)
    expected = published_run(pipe, heads, latents, recurrent, eta, target)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # the schedulers' tables are in float32
    assert (found[1] - found[0]).abs().max() > 1e-2  # which begins as the other and is not guided
    assert [step.backward_passes for step in handle.stats.steps] == [recurrent] * (STEPS - 1) + [0]
    assert handle.stats.steps[0].lanes == 2 * recurrent + 2


def test_a_clean_reference_is_read_under_both_conditions():
    pipe = double()
    denoiser = Denoiser.from_pipe(pipe)
    layer = readout_layers(pipe.unet)[-1]
    head = convert_readout(checkpoint(denoiser, "appearance", idxs=(11,)), denoiser)[0].double()
    reference = normal(4, *SIZE, seed=3)
    config = ReadoutGuidance(head, reference=reference, published=True, seed=11)
    kept = {}
    conv = pipe.unet.conv_in.register_forward_pre_hook(lambda m, args: kept.update(x=args[0].detach()))
    latents = normal(1, 4, *SIZE)
    with guide(pipe, config) as handle:
        images(pipe, "sd", 1, SCALE, steps=1, negative_prompt="", latents=latents.clone(), **PIXELS)
    conv.remove()
    step = handle.stats.steps[0]
    assert (step.lanes, step.passes, step.backward_passes) == (6, 4, 1)
    with torch.no_grad():
        cond, null = pipe.encode_prompt("a cat", "cpu", 1, True)
    t, outs = int(step.level.timestep), []
    level = denoiser.level(t)
    noise = torch.randn(1, 4, *SIZE, generator=torch.Generator().manual_seed(11)).double()
    other, x = level.alpha * reference + level.sigma * noise, latents.clone().requires_grad_(True)
    tap = pipe.unet.get_submodule(layer).register_forward_hook(lambda m, a, out: outs.append(out))
    loss = 0
    for context in (null, cond):
        for given in (other, x):
            pipe.unet(given, t, context)
        there, here = (head({layer: value}, 1000 - t) for value in outs[-2:])  # so it embeds t
        loss = (
            loss + (1 - functional.cosine_similarity(there.detach(), here)).mean() * (x.max() - x.min()).detach() ** 2
        )
    tap.remove()
    (g,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(kept["x"][:1], latents - RATE * g / (g.abs() + 1e-8), rtol=0, atol=1e-9)


# Several heads as one step


def test_a_sum_is_the_gradient_of_the_summed_losses():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    first, second = readout(denoiser), readout(denoiser, "appearance")
    parts = [ReadoutGuidance(first, TARGET, weight=0.3), ReadoutGuidance(second, reference=normal(2, 16, 24, seed=4))]
    both, stats = eps_gradient(denoiser, SummedReadoutGuidance(parts), x)
    alone = [eps_gradient(denoiser, part, x)[0] for part in parts]
    torch.testing.assert_close(both, alone[0] + alone[1], rtol=1e-6, atol=1e-12)
    assert (stats.passes, stats.backward_passes) == (2, 1)
    moved = seen_inputs(denoiser, SummedReadoutGuidance(parts, scale=0.05), x)
    torch.testing.assert_close(moved, x - 0.05 * both.sign(), rtol=0, atol=1e-12)


def test_published_parts_may_be_in_a_published_sum():
    part = ReadoutGuidance(readout(bare()), TARGET, published=True)
    summed = SummedReadoutGuidance([part], published=True)
    assert (summed.update, summed.replace(scale=0.1).parts[0].published) == ("latent_adam", True)
    with pytest.raises(ValueError, match="has published, which the sum decides"):
        SummedReadoutGuidance([part])


def test_steps_are_those_of_one_adam():
    denoiser, x = bare(), normal(2, 2, 16, 24)
    config = ReadoutGuidance(readout(denoiser), TARGET, update="latent_adam", steps=3, scale=0.05)
    leaf = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([leaf], lr=0.05)
    for _ in range(3):
        leaf.grad, _ = eps_gradient(denoiser, config.replace(steps=1), leaf.detach())
        optimizer.step()
    torch.testing.assert_close(seen_inputs(denoiser, config, x), leaf.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda part: [part.replace(scale=0.1)], "has scale, which the sum decides"),
        (lambda part: [part, part.replace(update="eps", interval=(1, 5))], "has interval, update, which the sum"),
        (lambda part: [], "at least one"),
    ],
)
def test_parts_with_settings_of_the_step(make, what):
    part = ReadoutGuidance(readout(bare(dtype=torch.float32)), TARGET)
    with pytest.raises(ValueError, match=what):
        SummedReadoutGuidance(make(part))


def test_what_is_of_steps_alone():
    head = readout(bare(dtype=torch.float32))
    with pytest.raises(TypeError, match="sums ReadoutGuidance"):
        SummedReadoutGuidance([head])
    for settings in ({"steps": 2}, {"published": True}):
        with pytest.raises(ValueError, match="no steps on the latents"):
            ReadoutGuidance(head, TARGET, update="eps", **settings)
    with pytest.raises(ValueError, match="whole number from 1; got 0"):
        ReadoutGuidance(head, TARGET, steps=0)
    denoiser = bare()
    config = ReadoutGuidance(readout(denoiser), TARGET, published=True)
    assert config.update == "latent_adam"
    with (
        torch.no_grad(),
        guide(denoiser, config, scheduler=stepped(denoiser)),
        pytest.raises(ValueError, match="guidance_scale above 1, or leave published=False"),
    ):
        denoiser.model(normal(1, 2, 16, 24), AT)


def test_an_update_that_nobody_chose_follows():
    plain = ReadoutGuidance(readout(bare(dtype=torch.float32)), TARGET)
    assert plain.replace(published=True).update == "latent_adam"
    assert plain.replace(scale=1.0).update == "latent_sign"
    assert plain.replace(update="latent_adam").replace(scale=1.0).update == "latent_adam"
