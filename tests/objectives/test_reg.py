import math

import pytest
import torch
from diffusers import DDIMPipeline, FlowMatchEulerDiscreteScheduler
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from diffusers_repr.schedulers_ext.scheduling_flow_match_sde import FlowMatchSDEScheduler
from torch import nn

from diffusers_repr import PAG, Denoiser, FeatureExtractor, guide
from diffusers_repr.encoders import Encoder
from diffusers_repr.models import ClassTokenHead
from diffusers_repr.objectives import (
    AttentionAlignmentLoss,
    REGObjective,
    REPAConfig,
    REPAObjective,
    SelfAlignmentLoss,
    SpatialAlignmentLoss,
    build_repa,
)
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


def entered(head, token):
    """Linear layer and layer norm with weights, written out."""
    hidden = token @ head.embed.weight.T + head.embed.bias
    centred = hidden - hidden.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * head.norm.weight + head.norm.bias


def token_pipeline(scheduler=None, dtype=torch.float64):
    head = shake(ClassTokenHead(16, 6), 7)
    pipe = SiTPipeline(sit().model.eval(), scheduler or FlowMatchODEScheduler(), class_token=head).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    token = entered(objective.class_token, column[0] * z + column[1] * eps)
    target = column[2] * z + column[3] * eps
    assert target.shape == (3, 6)
    image = [v.view(-1, 1, 1, 1) for v in (a, s, a_dot, s_dot)]
    x_t = image[0] * data["pixel_values"] + image[1] * data["noise"]
    predicted, state, states = forward_with_token(objective.network, x_t, data["time"], data["class_labels"], token)
    wanted = image[2] * data["pixel_values"] + image[3] * data["noise"]
    assert out["denoising"].item() == pytest.approx((predicted - wanted).square().mean().item(), abs=1e-4)
    own = (objective.class_token.read(state) - target).square().mean()
    assert out["class_token"].item() == pytest.approx(own.item(), abs=1e-4)
    projected = objective.losses["alignment"].projectors[0].layers(states[1])
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


def test_attention_is_aligned_without_the_class_token():
    encoder = class_teacher()
    term = AttentionAlignmentLoss(None, ["blocks.0.attn"], (0,))
    objective = REGObjective(sit(), [TinyTeacher(encoder.source, "teacher")], "blocks.1", losses=[term], **SMALL)
    assert math.isfinite(objective(batch())["attention"].item())


def test_what_is_saved_denoises_both_and_training_goes_on_from_it(tmp_path):
    plain = SiTPipeline(sit().model, FlowMatchODEScheduler())
    objective = REGObjective(Denoiser.from_pipe(plain), [class_teacher()], "blocks.1", **SMALL)
    shake(objective.class_token, 7)
    assert list(objective.ema_modules()) == ["network", "class_token"]
    assert list(objective.networks()) == ["network"]
    assert "class_tokens" in objective.card["text"]
    objective.save_pretrained(tmp_path, objective.trained_state(), torch.float32)
    assert [path.name for path in (tmp_path / "heads").iterdir()] == ["projector-teacher"]
    pipe = SiTPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(class_labels=[1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert out.class_tokens.shape == (2, 6)
    assert plain.class_token is None
    with pytest.raises(ValueError, match="guidance would move the image alone"):
        guide(pipe, [PAG(2.0, layers="blocks.1.*")])
    denoiser = Denoiser.from_pipe(pipe)
    with pytest.warns(UserWarning, match="trained with a class token"):
        FeatureExtractor(denoiser, ["blocks.1"], timestep=100)
    with pytest.raises(ValueError, match="denoises images together with a class token"):
        REPAObjective(denoiser, [class_teacher()], "blocks.1", **SMALL)
    wide = Encoder.from_module(WithClassToken(5), patch_size=2, prefix_tokens=1, name="wide")
    with pytest.raises(ValueError, match=r"class tokens of 6 channels, those of 'wide' have 5"):
        REGObjective(denoiser, [wide], "blocks.1", **SMALL)
    again = REGObjective(denoiser, [class_teacher()], "blocks.1", **SMALL)
    assert all(parameter.requires_grad for parameter in again.class_token.parameters())
    again.load_state_dict(objective.state_dict() | {k: v for k, v in again.state_dict().items() if "class" in k})
    assert torch.equal(again(batch() | fixed())["class_token"], objective(batch() | fixed())["class_token"])


def fixed():
    return {"time": torch.tensor([100.0, 500.0, 900.0]), "generator": torch.Generator().manual_seed(3)}


@pytest.mark.parametrize("guidance", [1.0, 2.3])
def test_sampling_denoises_both(guidance):
    pipe = token_pipeline(FlowMatchODEScheduler() if guidance > 1 else FlowMatchEulerDiscreteScheduler())
    labels, generator = [0, 3], torch.Generator().manual_seed(1)
    x, token = (torch.randn(2, *shape, generator=generator).double() for shape in ((3, 8, 8), (6,)))
    drawn = torch.Generator().set_state(after(x))
    out = pipe(labels, guidance_scale=guidance, guidance_interval=(0.0, 0.85), num_inference_steps=3,
               latents=x, generator=drawn, output_type="latent")  # fmt: skip
    times = [*(pipe.scheduler.timesteps.double() / 1000).tolist(), 0.0]
    with torch.no_grad():
        for now, then in zip(times, times[1:], strict=False):
            moves = []
            for row in (torch.tensor(labels), torch.tensor([5, 5])):
                time = torch.full((2,), 1000 * now, dtype=torch.float32)
                entering = entered(pipe.class_token, token)
                velocity, state, _ = forward_with_token(pipe.transformer, x, time, row, entering)
                moves.append((velocity, pipe.class_token.read(state)))
            s = guidance if now <= 0.85 else 1.0
            x, token = (
                value + (then - now) * (null + s * (cond - null))
                for value, cond, null in ((x, moves[0][0], moves[1][0]), (token, moves[0][1], moves[1][1]))
            )
    torch.testing.assert_close(out.images, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.class_tokens, token, rtol=0, atol=1e-5)


def after(x):
    """State of a generator that has drawn as many numbers."""
    generator = torch.Generator().manual_seed(1)
    torch.randn(x.shape, generator=generator)
    return generator.get_state()


@pytest.mark.parametrize(("scale", "token_scale"), [(1.0, None), (2.3, None), (2.3, 1.5), (2.3, 1.0)])
def test_the_papers_sampler_moves_both_by_its_own_noise(scale, token_scale):
    """REG's Euler-Maruyama from t = 1 to 0.04 and the mean to 0: drifts are guided, each with its own scale.

    The image's noise is drawn before the token's.
    """
    pipe = token_pipeline(FlowMatchSDEScheduler())
    settings = {"guidance_scale": scale, "class_token_guidance_scale": token_scale, "guidance_interval": (0.0, 0.85)}
    drawn = torch.Generator().manual_seed(1)
    out = pipe([0, 3], num_inference_steps=3, generator=drawn, output_type="latent", **settings)
    generator = torch.Generator().manual_seed(1)
    state = [torch.randn(2, *shape, generator=generator).double() for shape in ((3, 8, 8), (6,))]
    scales = [scale, scale if token_scale is None else token_scale]
    times = [1.0, 0.52, 0.04, 0.0]
    with torch.no_grad():
        for now, then in zip(times, times[1:], strict=False):
            entering, time = entered(pipe.class_token, state[1]), torch.full((2,), 1000 * now, dtype=torch.float32)
            dt, drifts = then - now, []
            for row in (torch.tensor([0, 3]), torch.tensor([5, 5])):
                velocity, hidden, _ = forward_with_token(pipe.transformer, state[0], time, row, entering)
                moves = (velocity, pipe.class_token.read(hidden))
                scores = [-(x + (1 - now) * v) / now for v, x in zip(moves, state, strict=True)]
                drifts.append([v - 0.5 * (2 * now) * score for v, score in zip(moves, scores, strict=True)])
            for at, (cond, null) in enumerate(zip(*drifts, strict=True)):
                drift = null + scales[at] * (cond - null) if scale > 1 and now <= 0.85 else cond
                state[at] = state[at] + drift * dt
                if then > 0:
                    state[at] = state[at] + (2 * now * -dt) ** 0.5 * torch.randn(cond.shape, generator=generator)
    torch.testing.assert_close(out.images.double(), state[0], rtol=0, atol=2e-4)
    torch.testing.assert_close(out.class_tokens.double(), state[1], rtol=0, atol=2e-4)


def test_scales_of_the_token_that_would_not_act():
    pipe = token_pipeline(FlowMatchODEScheduler())
    for options, message in (
        ({"class_token_guidance_scale": 2.0}, "acts where guidance_scale does, and that is 1.0"),
        ({"class_token_guidance_scale": 0.0, "guidance_scale": 2.0}, "lies above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe([0, 3], num_inference_steps=1, **options)
    pipe.register_modules(class_token=None)
    with pytest.raises(ValueError, match="this pipeline has none"):
        pipe([0, 3], num_inference_steps=1, guidance_scale=2.0, class_token_guidance_scale=2.0)


def test_the_recipe():
    objective = build_repa(sit(), [class_teacher()], REPAConfig(encoder=["x"], reg_weight=0.03, projector_dim=8))
    assert isinstance(objective, REGObjective)
    assert objective.class_weight == 0.03


def test_bad_input():
    with pytest.raises(ValueError, match="pass encoders"):
        REGObjective(sit(), [])
    with pytest.raises(ValueError, match="projector_kind='mlp'"):
        reg(alignment=SpatialAlignmentLoss("blocks.1"))
    with pytest.raises(ValueError, match="drop REG or SRA"):
        reg(losses=[SelfAlignmentLoss()])
    with pytest.raises(ValueError, match="class_weight must be finite"):
        reg(class_weight=-1.0)
    with pytest.raises(TypeError, match="got UNet2DModel"):
        REGObjective(Denoiser.from_pipe(build("ddim")), [teacher()], "mid_block")
    other = DDIMPipeline(sit().model, build("ddim").scheduler)
    with pytest.raises(TypeError, match="saved in a SiTPipeline; got DDIMPipeline"):
        REGObjective(Denoiser(other.unet, pipe=other, schedule=LINEAR), [class_teacher()], "blocks.1", **SMALL)
    with pytest.raises(ValueError, match=r"class_token must be \(2, 16\); got \(2, 6\)"):
        sit().model(torch.zeros(2, 3, 8, 8), 5.0, class_token=torch.zeros(2, 6))
