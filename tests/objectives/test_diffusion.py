"""The plain denoising loss, its draws, and what every objective inherits, over the families of models."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import nn

from diffusers_repr import Denoiser, Family
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives import DiffusionObjective, Objective
from diffusers_repr.objectives.adapters import merge_lora
from diffusers_repr.objectives.artifacts import rebuild
from diffusers_repr.objectives.times import TimeSampler
from tests.objectives.cases import COSINE, LINEAR, batch, sit
from tests.testers.models import build

VP = NoiseSchedule.from_scheduler(DDPMScheduler(num_train_timesteps=100))


def grey_unet(prediction="epsilon", classes=False):
    pipe = build("class_unet" if classes else "ddpm")
    pipe.scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=prediction)
    return Denoiser.from_pipe(pipe)


def images(denoiser, count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, denoiser.image_channels, *denoiser.image_size)
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_loss_of_ddpm_by_hand(prediction):
    denoiser = grey_unet(prediction)
    objective = DiffusionObjective(denoiser).eval()
    x0 = images(denoiser)
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 40, 99])
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    a, s = kept.sqrt().float(), (1 - kept).sqrt().float()
    target = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0}[prediction]
    with torch.no_grad():
        rows = [denoiser.model((a * x0 + s * noise)[i : i + 1], t[i]).sample for i in range(3)]
        got = objective({"pixel_values": x0, "noise": noise, "time": t})["loss"]
    torch.testing.assert_close(got, (torch.cat(rows) - target).square().mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("schedule", "path"), [
    (LINEAR, lambda t: (1 - t, t, -torch.ones_like(t), torch.ones_like(t))),
    (COSINE, lambda t: ((math.pi / 2 * t).cos(), (math.pi / 2 * t).sin(),
                        -math.pi / 2 * (math.pi / 2 * t).sin(), math.pi / 2 * (math.pi / 2 * t).cos())),
])  # fmt: skip
def test_the_loss_of_flow_models_by_hand(schedule, path):
    denoiser = sit(schedule)
    given = batch()
    noise, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([100.0, 402.5, 900.0])
    a, s, a_dot, s_dot = (part.view(-1, 1, 1, 1) for part in path(t / 1000))
    objective = DiffusionObjective(denoiser, label_dropout=0.0)
    kept = torch.zeros(3, dtype=torch.bool)
    with torch.no_grad():
        v = denoiser.model(a * given["pixel_values"] + s * noise, t, given["class_labels"], drop_mask=kept).sample
        got = objective({**given, "noise": noise, "time": t})["loss"]
    expected = (v - a_dot * given["pixel_values"] - s_dot * noise).square().mean()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "class_unet", "sd", "sd3", "dit", "pixart"])
def test_every_family_trains(name):
    """The loss is finite and every weight that acts gets a gradient; captions and labels are dropped as told."""
    denoiser = Denoiser.from_pipe(build(name))
    objective = DiffusionObjective(denoiser, label_dropout=0.5).train()
    given = {"pixel_values": images(denoiser), "class_labels": torch.tensor([0, 1, 0]),
             "caption": ["a", "bb", ""]}  # fmt: skip
    torch.manual_seed(0)
    loss = objective(given)["loss"]
    assert loss.isfinite()
    loss.backward()
    gradients = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in denoiser.model.parameters()]
    assert sum(gradients) > 0.5 * len(gradients)
    for part in objective.frozen.values():
        assert not any(p.requires_grad or p.grad is not None for p in part.parameters())
    assert not any(name.split(".")[0] in ("vae", "text_encoder", "denoiser") for name in objective.state_dict())


def test_captions_reach_the_network():
    denoiser = Denoiser.from_pipe(build("sd"))
    objective = DiffusionObjective(denoiser, label_dropout=0.0)
    plain = [objective.condition({"caption": captions}, 2)["encoder_hidden_states"] for captions in
             (["ab", "c"], ["c", "ab"], ["", ""])]  # fmt: skip
    assert torch.equal(plain[0], plain[1].flip(0))
    assert not torch.allclose(plain[0][0], plain[0][1])
    dropped = DiffusionObjective(denoiser, label_dropout=1.0).condition({"caption": ["ab", "c"]}, 2)
    assert torch.equal(dropped["encoder_hidden_states"], plain[2])


def test_text_models_want_captions():
    denoiser = Denoiser.from_pipe(build("sd"))
    with pytest.raises(ValueError, match=r"caption_column, or set label_dropout to 1"):
        DiffusionObjective(denoiser).check_batch({"pixel_values": images(denoiser)})
    DiffusionObjective(denoiser).check_batch({"pixel_values": images(denoiser), "caption": ["a", "b", ""]})
    DiffusionObjective(denoiser, label_dropout=1.0).check_batch({"pixel_values": images(denoiser)})


# Latents


def test_the_card_is_of_the_bases_kind():
    text = DiffusionObjective(Denoiser.from_pipe(build("sd"), name="org/base")).card
    assert (text["pipeline_tag"], text["kind"]) == ("text-to-image", "text-to-image diffusion model")
    assert "text-to-image" in text["tags"]
    assert text["base_model"] == "org/base"
    classes = DiffusionObjective(Denoiser.from_pipe(build("dit"), name="outputs/dit/run")).card
    assert classes["pipeline_tag"] == "unconditional-image-generation"
    assert "class-conditional-image-generation" in classes["tags"]
    assert "base_model" not in classes  # a folder is no model of the Hub
    assert DiffusionObjective(Denoiser.from_pipe(build("ddpm"))).card["kind"] == "unconditional diffusion model"

    class Named(DiffusionObjective):
        card = {**Objective.card, "kind": "sharpener", "tags": ["diffusers", "sharpening"]}

    own = Named(Denoiser.from_pipe(build("ddpm"))).card
    assert (own["kind"], own["tags"][-1]) == ("sharpener", "sharpening")
    assert own["pipeline_tag"] == "unconditional-image-generation"


def test_moments_equal_the_encoder_they_come_from():
    torch.manual_seed(0)
    denoiser = Denoiser.from_pipe(build("dit"))
    assert isinstance(denoiser.vae, AutoencoderKL)
    objective = DiffusionObjective(denoiser)
    pixels = images(denoiser)
    with torch.no_grad():
        posterior = denoiser.vae.encode(pixels).latent_dist
    moments = torch.cat([posterior.mean, posterior.std], dim=1)
    drawn = [objective.clean({**given, "generator": torch.Generator().manual_seed(3)}) for given in
             ({"pixel_values": pixels}, {"moments": moments})]  # fmt: skip
    torch.testing.assert_close(*drawn)
    other = objective.clean({"moments": moments, "generator": torch.Generator().manual_seed(4)})
    assert not torch.allclose(drawn[1], other)
    assert drawn[0].dtype == torch.float32


# Labels


def test_labels_are_dropped_as_often_as_said():
    objective = DiffusionObjective(sit(), label_dropout=0.1)
    labels = torch.arange(100_000) % 5
    torch.manual_seed(0)
    given = objective.condition({"class_labels": labels}, len(labels))
    gone = given["class_labels"] == 5
    assert not given["drop_mask"].any()  # the network draws none of its own
    assert torch.equal(given["class_labels"][~gone], labels[~gone])
    assert abs(gone.float().mean() - 0.1) < 4 * (0.1 * 0.9 / len(labels)) ** 0.5
    for label in range(5):  # no class more than another
        assert abs(gone[labels == label].float().mean() - 0.1) < 4 * (0.1 * 0.9 / 20_000) ** 0.5
    pairs = (gone[:-1] & gone[1:]).float().mean()  # neighbours are independent
    assert abs(pairs - 0.01) < 5 * (0.01 / len(labels)) ** 0.5
    kept = objective.condition({"class_labels": labels}, len(labels), drop=False)
    assert torch.equal(kept["class_labels"], labels)


def test_a_dropped_label_is_the_null_class_in_the_whole_network():
    denoiser = sit()
    given = {**batch(), "noise": torch.randn(3, 3, 8, 8), "time": torch.tensor([100.0, 400.0, 800.0])}
    with torch.no_grad():
        dropped = DiffusionObjective(denoiser, label_dropout=1.0).train()(given)["loss"]
        null = DiffusionObjective(denoiser, label_dropout=0.0)({**given, "class_labels": torch.full((3,), 5)})["loss"]
        kept = DiffusionObjective(denoiser, label_dropout=0.0)(given)["loss"]
    assert torch.equal(dropped, null)
    assert not torch.allclose(dropped, kept)


def test_null_labels_of_a_unet():
    denoiser = grey_unet(classes=True)
    count = denoiser.config["num_class_embeds"]
    objective = DiffusionObjective(denoiser)
    assert (objective.conditioner.num_classes, objective.conditioner.null_label) == (count - 1, count - 1)
    first = DiffusionObjective(denoiser, null_label=0)
    assert first.conditioner.null_label == 0
    without = DiffusionObjective(denoiser, label_dropout=0.0, null_label=-1)
    assert (without.conditioner.num_classes, without.conditioner.null_label) == (count, None)
    with pytest.raises(ValueError, match="label_dropout=0.1 has no null class to drop to"):
        DiffusionObjective(denoiser, null_label=-1)
    with pytest.raises(ValueError, match="label_dropout is a probability; got 1.5"):
        DiffusionObjective(denoiser, label_dropout=1.5)


@pytest.mark.parametrize(("labels", "message"), [
    (None, "class-conditional and the data have no class_labels"),
    ([0, 5], "class_labels from 0 to 5; the model's classes are 0 to 4"),
    ([-1, 2], "class_labels from -1 to 2; the model's classes are 0 to 4"),
])  # fmt: skip
def test_labels_that_do_not_fit(labels, message):
    objective = DiffusionObjective(sit())
    with pytest.raises(ValueError, match=message):
        objective.check_batch({} if labels is None else {"class_labels": torch.tensor(labels)})
    DiffusionObjective(sit(num_classes=0)).check_batch({})


# Times


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_uniform_times_of_flow_models(schedule):
    torch.manual_seed(0)
    t = TimeSampler().draw(schedule, 20_000).timestep.double() / 1000
    assert 0 <= t.min() < 0.001
    assert 0.999 < t.max() <= 1
    assert torch.histc(t, 10, 0, 1).sub(2000).abs().max() < 5 * 2000**0.5


def test_uniform_times_of_ddpm_are_whole_and_each_as_often():
    torch.manual_seed(0)
    t = TimeSampler().draw(VP, 50_000).timestep
    counts = torch.bincount(t.long(), minlength=100)
    assert torch.equal(t, t.round())
    assert len(counts) == 100
    assert counts.sub(500).abs().max() < 5 * 500**0.5


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal_times(mean, std):
    torch.manual_seed(0)
    level = TimeSampler("logit_normal", mean, std).draw(LINEAR, 20_000)
    logits = torch.logit(level.timestep.double() / 1000)
    assert abs(logits.mean() - mean) < 5 * std / 20_000**0.5
    assert abs(logits.std() - std) < 5 * std / 40_000**0.5
    torch.manual_seed(0)
    other = TimeSampler("lognormal", mean, std).draw(LINEAR, 20_000)  # on the linear path the two are one
    torch.testing.assert_close(level.timestep, other.timestep, rtol=1e-4, atol=1e-2)


def test_lognormal_levels_of_edm():
    schedule = NoiseSchedule("edm", "edm", sigma_min=1e-4, sigma_max=1e4)
    torch.manual_seed(0)
    level = TimeSampler("lognormal", -1.2, 1.2).draw(schedule, 20_000)
    logs = level.nsr.double().log()
    assert abs(logs.mean() + 1.2) < 5 * 1.2 / 20_000**0.5
    with pytest.raises(ValueError, match="no uniform time; use time_sampling='lognormal'"):
        TimeSampler().draw(schedule, 2)


def test_bad_time_sampling():
    with pytest.raises(ValueError, match="expected one of uniform, logit_normal, lognormal"):
        TimeSampler("cosine")
    with pytest.raises(ValueError, match="std of the time sampling must be positive"):
        TimeSampler("lognormal", 0.0, 0.0)


def test_draws_follow_the_generator_or_the_global_one():
    objective = DiffusionObjective(sit())
    given = batch()
    noisy = [objective.noised({**given, "generator": torch.Generator().manual_seed(seed)}) for seed in (1, 1, 2)]
    assert torch.equal(noisy[0].x_t, noisy[1].x_t)
    assert not torch.equal(noisy[0].x_t, noisy[2].x_t)
    for _ in range(2):
        torch.manual_seed(5)
        noisy.append(objective.noised(given))
    assert torch.equal(noisy[3].x_t, noisy[4].x_t)


# What every objective inherits


class Parts(Objective):
    def __init__(self):
        super().__init__()
        self.network, self.head = nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.head.register_buffer("cache", torch.zeros(1), persistent=False)
        self.network.bias.requires_grad_(False)


def test_frozen_parts():
    objective = Parts()
    teacher = objective.freeze("teacher", nn.Linear(2, 2))
    other = objective.freeze("other", object())  # anything with a method to move it, such as an Encoder
    assert objective.frozen == {"teacher": teacher, "other": other}
    objective.train().double()
    assert not teacher.training
    assert teacher.weight.dtype == torch.float64
    assert not any("teacher" in name for name in objective.state_dict())
    objective.to("meta")
    assert objective.network.weight.is_meta
    assert not teacher.weight.is_meta  # FSDP sends what it shards there, and brings only that back


def test_trained_state():
    assert sorted(Parts().trained_state()) == [
        "head.bias", "head.num_batches_tracked", "head.running_mean", "head.running_var", "head.weight",
        "network.weight",
    ]  # fmt: skip


def test_rebuilt_models_share_nothing():
    denoiser = sit()
    state = {f"network.{name}": tensor + 1 for name, tensor in denoiser.model.state_dict().items()}
    before = torch.get_rng_state()
    fresh = rebuild(denoiser.model.train(), state, "network.")
    assert torch.equal(torch.get_rng_state(), before)
    assert not fresh.training
    for name, tensor in denoiser.model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor + 1)
        assert fresh.state_dict()[name].data_ptr() != state[f"network.{name}"].data_ptr()
    settings = {k: v for k, v in denoiser.model.config.items() if not k.startswith("_")}
    assert {k: v for k, v in fresh.config.items() if not k.startswith("_")} == settings


def test_adapters_are_merged():
    down, up, weight = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4, 5)
    state = {"a.base_layer.weight": weight, "a.base_layer.bias": torch.ones(4), "b.weight": torch.ones(1),
             "a.lora_A.default.weight": down, "a.lora_B.default.weight": up}  # fmt: skip
    merged = merge_lora(state)
    assert sorted(merged) == ["a.bias", "a.weight", "b.weight"]
    torch.testing.assert_close(merged["a.weight"], weight + up @ down)


def test_what_a_method_must_define():
    objective = Objective()
    with pytest.raises(NotImplementedError):
        objective({})
    with pytest.raises(NotImplementedError):
        objective.artifacts()
    with pytest.raises(TypeError, match="build it by Denoiser.from_pipe"):
        DiffusionObjective(sit()).result({})


def test_class_inputs_of_another_name():
    """A family of one's own may call its class input as it likes."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Embedding(4, 1)
            self.config = {"in_channels": 3, "sample_size": 8, "num_classes": 3}

        def forward(self, sample, timestep, kind):
            return sample * self.scale(kind)[:, :, None, None]

    class NamedFamily(Family):
        conditioning = "class"

        def from_class_labels(self, labels):
            return {"kind": torch.full((1,), 3) if labels is None else labels}

    denoiser = Denoiser(Named(), DDPMScheduler(), family=NamedFamily())
    objective = DiffusionObjective(denoiser, label_dropout=0.0)
    loss = objective({"pixel_values": torch.rand(2, 3, 8, 8), "class_labels": torch.tensor([0, 2])})["loss"]
    loss.backward()
    assert (denoiser.model.scale.weight.grad[:, 0] != 0).tolist() == [True, False, True, False]
