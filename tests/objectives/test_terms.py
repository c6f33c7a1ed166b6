import copy
import math
import types

import pytest
import torch
from diffusers import EDMEulerScheduler
from torch import nn

from diffusers_repr import Denoiser
from diffusers_repr.capture import capture, capture_attention
from diffusers_repr.encoders import Encoder
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives import (
    AlignmentLoss,
    AttentionAlignmentLoss,
    DiffusionObjective,
    DispersiveLoss,
    REPAConfig,
    REPAObjective,
    SelfAlignmentLoss,
    SpatialAlignmentLoss,
    build_repa,
)
from diffusers_repr.objectives.auxiliary.dispersive import dispersive_loss
from diffusers_repr.objectives.auxiliary.haste import attention_alignment_loss
from diffusers_repr.objectives.auxiliary.irepa import standardize_spatially
from diffusers_repr.objectives.auxiliary.sra import WeightFall, less_noisy
from tests.objectives.cases import COSINE, LINEAR, SMALL, attention_teacher, backward, batch, sit, teacher
from tests.testers.models import build

EDM = NoiseSchedule.from_scheduler(EDMEulerScheduler())

# iREPA


def test_standardised_targets():
    z = torch.randn(2, 9, 4, dtype=torch.float64)
    for gamma in (0.0, 0.6, 1.0):
        got = standardize_spatially(z, gamma)
        for b in range(2):
            for c in range(4):
                row = z[b, :, c]
                mean = sum(row.tolist()) / 9
                std = math.sqrt(sum((v - mean) ** 2 for v in row.tolist()) / 8)
                wanted = (row - gamma * mean) / (std + 1e-6)
                assert torch.allclose(got[b, :, c], wanted)
    assert standardize_spatially(z, 1.0).mean(1).abs().max() < 1e-12
    assert bool((standardize_spatially(torch.full((1, 4, 2), 3.0), 1.0) == 0).all())
    with pytest.raises(ValueError, match="N > 1"):
        standardize_spatially(torch.ones(1, 1, 2))


def test_irepa_as_an_option():
    objective = REPAObjective(sit(), [teacher()], alignment=SpatialAlignmentLoss("blocks.1"))
    term = objective.losses["alignment"]
    assert (term.weight, term.spatial_norm) == (1.0, 0.6)
    assert isinstance(term.projectors[0].layers, nn.Conv2d)
    assert term.projectors[0].layers.kernel_size == (3, 3)
    out, _ = backward(objective, batch())
    seen = {}
    term.register_forward_hook(lambda module, args, output: seen.update(step=args[0]))
    torch.manual_seed(0)
    objective(batch())
    step = seen["step"]
    projected = term.projectors[0](step.layers["blocks.1"].values, (4, 4))
    target = standardize_spatially(step.teachers.tokens("teacher").values, 0.6)
    cosine = nn.functional.cosine_similarity(projected, target, dim=-1)
    assert out["alignment"].item() == pytest.approx(-cosine.mean().item(), abs=1e-6)


# Dispersive loss


def looped_dispersion(h, temperature):
    total = 0.0
    for one in h.double().flatten(1):
        for other in h.double().flatten(1):
            total += math.exp(-float((one - other).square().sum()) / (len(one) * temperature))
    return math.log(total / len(h) ** 2)


def test_the_dispersive_loss_equals_the_double_loop():
    h = torch.randn(5, 4, 3)
    for temperature in (0.25, 1.0):
        assert dispersive_loss(h, temperature).item() == pytest.approx(looped_dispersion(h, temperature), abs=1e-6)
    assert dispersive_loss(h[torch.randperm(5)]).item() == pytest.approx(dispersive_loss(h).item(), abs=1e-6)


def test_bounds_of_the_dispersive_loss():
    assert dispersive_loss(torch.ones(6, 3)).item() == pytest.approx(0, abs=1e-6)
    assert dispersive_loss(1e3 * torch.randn(6, 3)).item() == pytest.approx(-math.log(6), abs=1e-5)
    assert math.isfinite(dispersive_loss((torch.randn(4, 8) * 1e4).half()).item())


def test_two_points_are_pushed_apart_along_their_difference():
    h = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    dispersive_loss(h).backward()
    difference = h.detach()[1] - h.detach()[0]
    step = -h.grad
    assert torch.allclose(step[1], -step[0])
    assert float(step[1] @ difference) > 0
    assert abs(float(step[1][0] * difference[1] - step[1][1] * difference[0])) < 1e-12


def test_the_dispersive_term_needs_no_teacher():
    objective = REPAObjective(sit(layers=8), losses=[DispersiveLoss()])
    assert objective.losses["dispersive"].layer == "blocks.1"
    out, grads = backward(objective, batch())
    assert out["loss"].item() == pytest.approx((out["denoising"] + 0.5 * out["dispersive"]).item(), abs=1e-6)
    assert grads["network.blocks.0.ff.net.2.weight"].abs().max() > 0
    unet = REPAObjective(Denoiser.from_pipe(build("ddim")), losses=[DispersiveLoss("mid_block")])
    assert unet(batch(2, 16))["dispersive"].item() < 0


# HASTE


def test_attention_loss_equals_the_loop_and_is_least_at_the_target():
    q, k = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    target = torch.randn(2, 2, 5, 5, dtype=torch.float64).softmax(-1)
    total = 0.0
    for b in range(2):
        for head in range(2):
            for row in range(5):
                logits = [float(q[b, head, row] @ k[b, head, m]) / 2 for m in range(5)]
                norm = math.log(sum(math.exp(v) for v in logits))
                total -= sum(float(target[b, head, row, m]) * (logits[m] - norm) for m in range(5))
    assert attention_alignment_loss(q, k, target).item() == pytest.approx(total / 20, abs=1e-10)
    own = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    entropy = -(own * own.log()).sum(-1).mean().item()
    assert attention_alignment_loss(q, k, own).item() == pytest.approx(entropy, abs=1e-10)
    assert attention_alignment_loss(q + 0.1 * torch.randn_like(q), k, own).item() > entropy
    with pytest.raises(ValueError, match="over 5 tokens, the teacher over 6"):
        attention_alignment_loss(q, k, torch.ones(2, 2, 6, 6) / 6)


def haste(stop=None, **changes):
    term = AttentionAlignmentLoss(None, None, (0, 1), stop_step=stop)
    alignment = AlignmentLoss(stop_step=stop, **SMALL)
    return REPAObjective(sit(layers=6, **changes), [attention_teacher()], alignment=alignment, losses=[term])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_attention_that_is_aligned_is_the_networks_own(qk_norm):
    objective = haste(qk_norm=qk_norm)
    assert objective.losses.capture.attentions == ("blocks.0.attn", "blocks.1.attn")
    noisy = objective.noised(batch())
    _, step = objective.observe(noisy)
    inputs = objective.denoiser.network_inputs(noisy.x_t, noisy.level, noisy.condition)
    with capture_attention(objective.network, list(objective.losses.capture.attentions), heads=None) as tape:
        objective.network(**inputs)
    for path, (query, key) in step.attention.items():
        own = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        assert torch.allclose(own, tape[path], atol=1e-6)


@pytest.mark.parametrize(
    ("depth", "layer", "blocks", "taught"),
    [
        (12, None, [4, 5, 6, 7], (-4, -3, -2, -1)),  # the code's, though REPA aligns block 3 here
        (28, "blocks.3", [4, 5, 6, 7], (-4, -3, -2, -1)),
        (8, "blocks.2", [4, 5, 6, 7], (-4, -3, -2, -1)),  # the recipe of the digits
        (7, "blocks.5", [2, 3, 4, 5], (-4, -3, -2, -1)),
        (6, "blocks.1.ff", [0, 1], (-2, -1)),
        (6, None, [0, 1], (-2, -1)),
        (3, "norm_out", [0], (-1,)),
    ],
)
def test_which_attentions_are_paired_by_default(depth, layer, blocks, taught):
    (term,) = REPAConfig(encoder=["x"], haste_weight=0.5).losses()
    objective = REPAObjective(sit(layers=depth), [attention_teacher()], layer, losses=[term], **SMALL)
    assert objective.losses.capture.attentions == tuple(f"blocks.{at}.attn" for at in blocks)
    assert term.teacher_layers == taught == objective.teachers_of(objective.noised(batch())).attentions["teacher"]
    assert math.isfinite(objective(batch())["attention"].item())


def test_haste_ends_both_losses():
    objective = haste(stop=3)
    plain = REPAObjective(sit(layers=6))
    out, grads = backward(objective, batch())
    assert grads["network.blocks.0.attn.to_q.weight"].abs().max() > 0
    total = out["denoising"] + 0.5 * out["alignment"] + 0.5 * out["attention"]
    assert out["loss"].item() == pytest.approx(total.item(), abs=1e-6)
    objective.on_step_end(2, None)
    assert "attention" in objective(batch())
    objective.on_step_end(3, None)
    out, grads = backward(objective, batch())
    assert sorted(out) == ["denoising", "loss"]
    wanted, plain_grads = backward(plain, batch())
    assert torch.equal(out["loss"], wanted["loss"])
    assert all(torch.equal(grads[name], plain_grads[name]) for name in plain_grads)
    rest = {name: grad for name, grad in grads.items() if name not in plain_grads}
    assert rest  # DDP waits for a gradient of every parameter
    assert all(bool((grad == 0).all()) for grad in rest.values())


def test_attention_of_other_families():
    term = AttentionAlignmentLoss(None, ["transformer_blocks.1.attn1"], (0,))
    denoiser = Denoiser.from_pipe(build("dit"))
    objective = REPAObjective(denoiser, [attention_teacher(4)], "transformer_blocks.1", losses=[term], **SMALL)
    with pytest.raises(ValueError, match="over 64 tokens, the teacher over 16"):
        objective(batch(2, 32))
    with pytest.raises(ValueError, match="cannot be aligned: it joins two streams"):
        REPAObjective(
            Denoiser.from_pipe(build("sd3")),
            [attention_teacher()],
            "transformer_blocks.0",
            match_grid="interpolate_teacher",
            losses=[AttentionAlignmentLoss(None, ["transformer_blocks.0.attn"], (0,))],
        )


def test_attention_is_paired_alike_in_front_of_the_alignment():
    paired = []
    for at in (0, 1):
        losses = [AlignmentLoss("blocks.2", **SMALL)]
        losses.insert(at, AttentionAlignmentLoss())
        objective = DiffusionObjective(sit(), losses=losses, encoders=[attention_teacher()])
        paired.append(objective.losses["attention"].describe())
    assert paired[0] == paired[1]
    assert paired[0]["layers"][-1] == "blocks.2.attn"


def test_attention_needs_a_teacher_with_as_many_layers():
    with pytest.raises(ValueError, match="no encoder None among none"):
        REPAObjective(sit(), losses=[AttentionAlignmentLoss()])
    with pytest.raises(ValueError, match=r"1 layers .* and 2 teacher_layers"):
        REPAObjective(
            sit(), [attention_teacher()], losses=[AttentionAlignmentLoss(None, ["blocks.0.attn"], (0, 1))], **SMALL
        )
    with pytest.raises(ValueError, match=r"4 teacher_layers, and 2 blocks up to blocks\.1"):
        REPAObjective(
            sit(),
            [attention_teacher()],
            "blocks.1",
            losses=[AttentionAlignmentLoss(None, None, (0, 1, 2, 3))],
            **SMALL,
        )
    objective = haste()
    with pytest.raises(ValueError, match="neither pixel_values"):
        objective.check_batch({"class_labels": torch.tensor([1]), "features": {"teacher": torch.zeros(1, 16, 6)}})


# SRA


def moved(objective, change):
    """As after an optimizer step that adds to all weights."""
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter += change


def test_self_alignment_is_0_with_itself():
    term = SelfAlignmentLoss("blocks.1", "blocks.1", max_shift=0.0, projector_dim=0, distance="smooth_l1", ema_decay=0)
    objective = REPAObjective(sit(), losses=[term])
    assert objective(batch())["self_alignment"].item() < 1e-10
    moved(objective, 0.02)
    assert objective(batch())["self_alignment"].item() > 1e-3
    objective.on_step_end(1, None)
    assert objective(batch())["self_alignment"].item() < 1e-8


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


def looped_distance(a, b, distance):
    """Over tokens (the papers' code) or channels, number by number."""
    a, b = a.tolist(), b.tolist()
    rows = [(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(s, t, strict=True)]
    if distance == "cosine":
        rows = [(x, y) for s, t in zip(a, b, strict=True) for x, y in zip(columns(s), columns(t), strict=True)]
    if "cosine" in distance:
        norms = [math.hypot(*x) * math.hypot(*y) for x, y in rows]
        dots = [sum(p * q for p, q in zip(x, y, strict=True)) for x, y in rows]
        return sum(1 - dot / norm for dot, norm in zip(dots, norms, strict=True)) / len(rows)
    away = [abs(p - q) for x, y in rows for p, q in zip(x, y, strict=True)]
    of = {"l1": lambda d: d, "l2": lambda d: d * d,
          "smooth_l1": lambda d: d * d / 0.1 if d < 0.05 else d - 0.025}[distance]  # fmt: skip
    return sum(map(of, away)) / len(away)


@pytest.mark.parametrize(
    ("schedule", "distance"),
    [(LINEAR, "cosine"), (COSINE, "smooth_l1"), (LINEAR, "token_cosine"), (LINEAR, "l1"), (COSINE, "l2")],
)
def test_self_alignment_by_hand(schedule, distance):
    """The teacher, written out: an average by the loop, fed with an input made by the papers' formula."""
    term = SelfAlignmentLoss("blocks.0", "blocks.2", distance=distance, ema_decay=0.75)
    objective = REPAObjective(sit(schedule), losses=[term], label_dropout=0.5)
    twin = copy.deepcopy(objective.network).eval()
    for step in (1, 2):
        objective(batch())
        moved(objective, 0.01 * step)
        objective.on_step_end(step, None)
        with torch.no_grad():
            for mean, value in zip(twin.parameters(), objective.network.parameters(), strict=True):
                mean.copy_(0.75 * mean + 0.25 * value)
    torch.manual_seed(3)
    noisy = objective.noised(batch())
    state = torch.get_rng_state()
    _, seen = objective.observe(noisy)
    loss = term(seen)
    torch.set_rng_state(state)
    time = noisy.level.timestep.double() / 1000
    earlier = (time - 0.2 * torch.rand(3, dtype=torch.float64)).clamp(0, 1) * 1000
    level = schedule.resolve(earlier)
    x_t = level.alpha.view(-1, 1, 1, 1) * noisy.x0 + level.sigma.view(-1, 1, 1, 1) * noisy.noise
    with torch.no_grad(), capture(twin, "blocks.2", stop_early=False) as tape:
        twin(x_t, level.timestep.float(), **noisy.condition)
    one, two = (term.projector.layers[at] for at in (0, 2))
    assert (one.in_features, one.out_features, two.out_features) == (16, 32, 16)
    projected = two(nn.functional.silu(one(seen.layers["blocks.0"].values)))
    wanted = looped_distance(projected, tape["blocks.2"], distance)
    assert loss.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_the_teacher_is_an_average_of_its_own_that_a_checkpoint_keeps():
    objective = REPAObjective(sit(), losses=[SelfAlignmentLoss()])
    term = objective.losses["self_alignment"]
    assert (term.layer, term.teacher_layer, term.distance, term.weight) == ("blocks.0", "blocks.2", "cosine", 0.5)
    assert not [key for key in objective.state_dict() if "teacher" in key]
    frozen = objective.frozen["self-alignment-teacher"]
    objective.train()
    assert not frozen.training
    first = {name: value.clone() for name, value in frozen.state_dict().items()}
    _, grads = backward(objective, batch())
    assert all(parameter.grad is None for parameter in frozen.parameters())
    assert grads["terms.self_alignment.projector.layers.0.weight"].abs().max() > 0
    moved(objective, 1.0)
    # The run's average, with its warm-up, has no part in it: 1e-4 of the way, from the first step on.
    objective.on_step_end(1, types.SimpleNamespace(shadow={}, decay=0.0))
    kept = {name: value for name, value in objective.trained_state().items() if ".teacher." in name}
    assert len(kept) == len(first)
    for name, value in first.items():
        assert torch.allclose(kept[f"terms.self_alignment.teacher.{name}"] - value, torch.tensor(1e-4), atol=1e-6)
    after = {name: value.clone() for name, value in frozen.state_dict().items()}
    objective.on_step_end(1, None)  # as where a run is resumed: no step took place
    assert all(torch.equal(value, after[name]) for name, value in frozen.state_dict().items())
    half = REPAObjective(Denoiser(sit().model.half(), schedule=LINEAR), losses=[SelfAlignmentLoss()])
    assert half.frozen["self-alignment-teacher"].dtype == torch.float32


def test_the_teacher_follows_adapters():
    from diffusers_repr.training.lora import add_lora

    objective = REPAObjective(sit(), losses=[SelfAlignmentLoss(ema_decay=0.5)])
    frozen = objective.frozen["self-alignment-teacher"]
    before = frozen.blocks[0].attn.to_q.weight.clone()
    add_lora(objective, 2)
    objective(batch())
    q = objective.network.blocks[0].attn.to_q
    with torch.no_grad():
        q.lora_B.default.weight += 0.3
    objective.on_step_end(1, None)
    merged = q.base_layer.weight + q.lora_B.default.weight @ q.lora_A.default.weight
    assert torch.allclose(frozen.blocks[0].attn.to_q.weight, (before + merged) / 2, atol=1e-6)
    assert torch.equal(frozen.blocks[1].attn.to_q.weight, objective.network.blocks[1].attn.to_q.base_layer.weight)


def test_the_weight_of_self_alignment_falls_as_in_its_code():
    term = SelfAlignmentLoss(distance="smooth_l1")
    objective = REPAObjective(sit(), losses=[term])
    assert objective.identity()["terms"]["self_alignment"]["fall"] == {
        "start": 149, "length": 1000, "epoch_steps": 5004,
    }  # fmt: skip
    for epoch in (0, 149, 150, 400, 1149):
        for within in (0, 5003):
            objective.on_step_end(epoch * 5004 + within, None)
            code = 2 * (0.1 ** (((epoch - 149) / 1000 + 1) if epoch > 149 else 1))
            assert objective.loss_weights()["self_alignment"] == pytest.approx(code, rel=1e-12)
    out = objective(batch())
    assert out["loss"].item() == pytest.approx((out["denoising"] + 0.02 * out["self_alignment"]).item(), abs=1e-6)
    steps = WeightFall(start=2, length=4, epoch_steps=1)
    assert [steps.factor(step) for step in (2, 6)] == [1.0, pytest.approx(0.1)]
    constant = REPAObjective(sit(), losses=[SelfAlignmentLoss()])
    constant.on_step_end(10**7, None)
    assert constant.loss_weights()["self_alignment"] == 0.5
    dit = REPAObjective(Denoiser.from_pipe(build("dit")), losses=[SelfAlignmentLoss()]).losses["self_alignment"]
    assert (dit.distance, dit.current_weight, dit.fall) == ("smooth_l1", 0.04, WeightFall())
    for bad in ({"ema_decay": 1.5}, {"distance": "cos"}, {"max_shift": -1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SelfAlignmentLoss(**bad)


def test_less_noisy_times():
    level = LINEAR.resolve(torch.tensor([50.0, 500.0, 1000.0]).repeat(200))
    earlier = less_noisy(level, LINEAR, 0.2, torch.Generator().manual_seed(0)).timestep
    assert bool((earlier <= level.timestep).all())
    assert bool((earlier >= (level.timestep - 200).clamp(min=0)).all())
    assert float((level.timestep - earlier)[1::3].max()) > 190
    table = Denoiser.from_pipe(build("ddim")).schedule
    times = torch.tensor([3.0, 500.0]).repeat(4000)
    whole = less_noisy(table.resolve(times), table, 0.2, torch.Generator().manual_seed(0)).timestep
    assert sorted(set((times - whole)[1::2].tolist())) == list(range(200))  # randint(0, 200) of DiT's code
    assert sorted(set(whole[::2].tolist())) == [1, 2, 3]
    with pytest.raises(ValueError, match="no time in"):
        less_noisy(EDM.resolve(0.2), EDM, 0.2)
    with pytest.raises(ValueError, match="no time in"):
        REPAObjective(sit(EDM), losses=[SelfAlignmentLoss()])


# The recipe


def test_the_recipe_builds_all_of_it():
    config = REPAConfig(
        encoder=["x"], repa_layer="blocks.1", projector_dim=16, dispersive_weight=0.25, haste_weight=0.5,
        haste_layers=["blocks.0.attn"], haste_teacher_layers=[0], sra_weight=0.1, repa_stop_step=7, spatial_norm=0.6,
        time_sampling="lognormal", label_dropout=0.3,
    )  # fmt: skip
    objective = build_repa(sit(), [attention_teacher()], config)
    assert list(objective.losses) == ["alignment", "dispersive", "attention", "self_alignment"]
    assert {name: term.stop_step for name, term in objective.losses.each.items()} == {
        "alignment": 7, "dispersive": None, "attention": 7, "self_alignment": None,
    }  # fmt: skip
    assert objective.label_dropout == 0.3
    assert objective.time_sampling.kind == "lognormal"
    out, _ = backward(objective, batch())
    weights = {"denoising": 1, "alignment": 0.5, "dispersive": 0.25, "attention": 0.5, "self_alignment": 0.1}
    assert out["loss"].item() == pytest.approx(sum(weights[k] * out[k].item() for k in weights), abs=1e-5)
    assert list(build_repa(sit(), []).losses) == []


def test_the_recipe_is_read_by_the_parser():
    from transformers import HfArgumentParser

    flags = ["--encoder", "a", "b", "--match_grid", "pool_student", "--spatial_norm", "0.6", "--sra_weight", "0.2"]
    (config,) = HfArgumentParser(REPAConfig).parse_args_into_dataclasses(flags)
    assert config.encoder == ["a", "b"]
    assert (config.match_grid, config.spatial_norm, config.repa_layer) == ("pool_student", 0.6, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"haste_weight": 0.5}, "need a teacher"),
        ({"repa_coefficient": -1.0}, "`repa_coefficient` must not be negative"),
        ({"label_dropout": 1.5}, "is a probability"),
        ({"time_sampling": "normal"}, "expected one of"),
        ({"projector_dim": 0}, "`projector_dim` must be positive"),
    ],
)
def test_a_bad_recipe(options, message):
    with pytest.raises(ValueError, match=message):
        REPAConfig(**options)


def test_haste_with_a_real_teacher(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=3, image_size=16, patch_size=4, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, image_size=16, name="dino")
    term = AttentionAlignmentLoss()  # two blocks up to REPA's, so the last two of the teacher's three
    objective = REPAObjective(sit(), [encoder], "blocks.1", losses=[term], **SMALL)
    calls = []
    handle = encoder.module.register_forward_hook(lambda *_: calls.append(1))
    out, grads = backward(objective, batch())
    assert len(calls) == 1  # for features and attention together
    handle.remove()
    _, targets = encoder.encode_with_attention(batch()["pixel_values"], [1, 2])
    entropy = torch.stack([-(p * p.clamp(min=1e-12).log()).sum(-1).mean() for p in targets]).mean()
    assert out["attention"] > entropy
    assert grads["network.blocks.0.attn.to_k.weight"].abs().max() > 0
    with pytest.raises(ValueError, match=r"teacher_layers \[-4, 3\] are no blocks of the teacher 'dino': it has 3"):
        REPAObjective(
            sit(),
            [encoder],
            "blocks.1",
            losses=[AttentionAlignmentLoss(None, ["blocks.0.attn"] * 2, (-4, 3))],
            **SMALL,
        )
