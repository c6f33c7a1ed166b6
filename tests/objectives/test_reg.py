import math

import pytest
import torch
from torch import nn

from diffusers_repr import Denoiser
from diffusers_repr.encoders import Encoder
from diffusers_repr.objectives import AttentionAlignmentTerm, REPAConfig, SelfAlignmentTerm, build_repa
from diffusers_repr.objectives.reg import ClassTokenHead, ClassTokenSlot, REGObjective, sample_with_class_token
from tests.objectives.cases import COSINE, LINEAR, SMALL, TinyTeacher, backward, batch, shake, sit, teacher
from tests.testers.models import build


class WithClassToken(nn.Module):
    """Patches behind a class token of which the first number tells the image's mean."""

    def __init__(self, dim=6):
        super().__init__()
        self.conv = shake(nn.Conv2d(3, dim, 2, stride=2), 4)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        own = torch.stack([x.mean((1, 2, 3)) * (k + 1) for k in range(tokens.shape[2])], -1)
        return torch.cat([own[:, None], tokens], 1)


def class_teacher():
    return Encoder.from_module(WithClassToken(), patch_size=2, prefix_tokens=1, name="teacher")


def reg(schedule=LINEAR, **options):
    objective = REGObjective(sit(schedule), [class_teacher()], "blocks.1", **{**SMALL, **options})
    shake(objective.class_token, 7)
    return objective


def forward_with_token(network, x, time, labels, token):
    """SiT's forward with one more token, written out."""
    none = torch.zeros(len(x), dtype=torch.bool)
    temb = network._embed_time(time, x) + network.label_embed(labels)
    tokens = network.patch_embed(x).flatten(2).transpose(1, 2) + network.positions
    tokens = torch.cat([tokens, token[:, None]], 1)
    states = []
    for block in network.blocks:
        tokens = block(tokens, temb)
        states.append(tokens)
    tokens = network.norm_out(tokens, temb)
    image = network.proj_out(tokens[:, :-1]).reshape(len(x), 4, 4, 2, 2, 3)
    assert not none.any()
    return image.permute(0, 5, 1, 3, 2, 4).reshape(x.shape), tokens[:, -1], states


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_the_losses_by_hand(schedule):
    objective = reg(schedule, label_dropout=0.0)
    data = {**batch(), "noise": torch.randn(3, 3, 8, 8), "time": torch.tensor([100.0, 500.0, 900.0])}
    out = objective({**data, "generator": torch.Generator().manual_seed(3)})
    eps = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))
    features = class_teacher().encode_pixels(data["pixel_values"])
    t = data["time"] / 1000
    if schedule is LINEAR:
        a, s, a_dot, s_dot = 1 - t, t, -torch.ones(3), torch.ones(3)
    else:
        a, s = torch.cos(math.pi * t / 2), torch.sin(math.pi * t / 2)
        a_dot, s_dot = -math.pi / 2 * s, math.pi / 2 * a
    z = features.global_features
    column = [v.view(-1, 1) for v in (a, s, a_dot, s_dot)]
    token = objective.class_token.embed(column[0] * z + column[1] * eps)
    target = column[2] * z + column[3] * eps
    assert target.shape == (3, 6)
    image = [v.view(-1, 1, 1, 1) for v in (a, s, a_dot, s_dot)]
    x_t = image[0] * data["pixel_values"] + image[1] * data["noise"]
    objective.slot._token = None
    predicted, state, states = forward_with_token(objective.network, x_t, data["time"], data["class_labels"], token)
    wanted = image[2] * data["pixel_values"] + image[3] * data["noise"]
    assert out["denoising"].item() == pytest.approx((predicted - wanted).square().mean().item(), abs=1e-4)
    own = (objective.class_token.read(state) - target).square().mean()
    assert out["class_token"].item() == pytest.approx(own.item(), abs=1e-4)
    projected = objective.terms["alignment"].projectors[0].layers(states[1])
    targets = torch.cat([features.tokens, z[:, None]], 1)
    cosine = nn.functional.cosine_similarity(projected, targets, dim=-1).mean()
    assert out["alignment"].item() == pytest.approx(-cosine.item(), abs=1e-5)
    total = out["denoising"] + 0.5 * out["alignment"] + 0.03 * out["class_token"]
    assert out["loss"].item() == pytest.approx(total.item(), abs=1e-6)


def test_gradient_checkpointing_changes_nothing():
    plain, saved = reg(), reg()
    saved.load_state_dict(plain.state_dict())
    saved.network.enable_gradient_checkpointing()
    (one, a), (two, b) = backward(plain.train(), batch()), backward(saved.train(), batch())
    assert torch.equal(one["loss"], two["loss"])
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    assert a["class_token.embed.weight"].abs().max() > 0


def test_outside_the_block_the_network_is_as_it_was():
    objective = reg()
    plain = sit().model
    objective(batch())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5.0, 900.0])
    labels, none = torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(
            objective.network(x, t, labels, drop_mask=none).sample, plain(x, t, labels, drop_mask=none).sample
        )


def test_attention_is_aligned_without_the_class_token():
    encoder = class_teacher()
    term = AttentionAlignmentTerm(None, ["blocks.0.attn"], (0,))
    objective = REGObjective(sit(), [TinyTeacher(encoder.source, "teacher")], "blocks.1", terms=[term], **SMALL)
    assert math.isfinite(objective(batch())["attention"].item())


def test_its_head_is_saved_apart(tmp_path):
    objective = reg()
    heads = objective.heads(objective.trained_state())
    assert list(heads) == ["projector-teacher", "class-token"]
    heads["class-token"].save_pretrained(tmp_path)
    again = ClassTokenHead.from_pretrained(tmp_path)
    assert torch.equal(again.embed.weight, objective.class_token.embed.weight)


@pytest.mark.parametrize("guidance", [1.0, 2.3])
def test_sampling_denoises_both(guidance):
    denoiser, head = sit(), shake(ClassTokenHead(16, 6), 7)
    labels = [0, 3]
    x0, tokens = sample_with_class_token(
        denoiser, head, 2, labels, steps=3, guidance_scale=guidance, guidance_interval=(0.0, 0.85),
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    x, token = torch.randn(2, 3, 8, 8, generator=generator), torch.randn(2, 6, generator=generator)
    with torch.no_grad():
        for now in (1.0, 2 / 3, 1 / 3):
            moves = []
            for row in (torch.tensor(labels), torch.tensor([5, 5])):
                time = torch.full((2,), 1000 * now)
                velocity, state, _ = forward_with_token(denoiser.model, x, time, row, head.embed(token))
                moves.append((velocity, head.read(state)))
            s = guidance if now <= 0.85 else 1.0
            x, token = (
                value - (null + s * (cond - null)) / 3
                for value, cond, null in ((x, moves[0][0], moves[1][0]), (token, moves[0][1], moves[1][1]))
            )
    assert torch.allclose(x0, x, atol=1e-4)
    assert torch.allclose(tokens, token, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in denoiser.model.modules())


def test_the_recipe():
    objective = build_repa(sit(), [class_teacher()], REPAConfig(encoder=["x"], reg_weight=0.03, projector_dim=8))
    assert isinstance(objective, REGObjective)
    assert objective.class_weight == 0.03


def test_bad_input():
    with pytest.raises(ValueError, match="pass encoders"):
        REGObjective(sit(), [])
    with pytest.raises(ValueError, match="projector_kind='mlp'"):
        reg(projector_kind="conv")
    with pytest.raises(ValueError, match="drop REG or SRA"):
        reg(terms=[SelfAlignmentTerm()])
    with pytest.raises(ValueError, match="class_weight must be finite"):
        reg(class_weight=-1.0)
    with pytest.raises(TypeError, match="got UNet2DModel"):
        REGObjective(Denoiser.from_pipe(build("ddim")), [teacher()], "mid_block")
    with pytest.raises(TypeError, match="got Linear"):
        ClassTokenSlot(nn.Linear(1, 1))
