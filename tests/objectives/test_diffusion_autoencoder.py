"""DiffAE, InfoDiffusion and PDAE: losses by hand, penalties by loops, what is trained, saved and refused."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import distributions

from diffusers_repr.models import SemanticEncoder
from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives import (
    DiffusionAutoencoderConfig,
    DiffusionAutoencoderObjective,
    PenaltyConfig,
)
from diffusers_repr.objectives.diffusion_autoencoder import kl_divergence, mmd
from diffusers_repr.objectives.diffusion_autoencoder.weighting import snr_weights
from diffusers_repr.testing import check_objective
from tests.objectives.autoencoder_cases import acting, codes, denoiser, encoder, images, objective, unet
from tests.objectives.cases import backward
from tests.testers.models import build

KINDS = ("diffae", "infodiffusion", "kl", "pdae")
T = torch.tensor([3, 400, 990])


def batch(**more):
    return {"pixel_values": images(), "time": T, "noise": torch.randn(3, 1, 8, 8), **more}


# Losses


@pytest.mark.parametrize("kind", KINDS)
def test_keeps_the_contract(kind):
    check_objective(objective(kind), {"pixel_values": images()})


def test_the_loss_of_diffae_by_hand():
    made, data = acting(objective("diffae")).eval(), batch()
    ab = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)[T, None, None, None]
    x_t = (ab.sqrt() * data["pixel_values"] + (1 - ab).sqrt() * data["noise"]).float()
    with torch.no_grad():
        eps = made.decoder.model(x_t, T, made.encoder(data["pixel_values"]).code)[0]
        out = made(data)
    wanted = sum(float((a - b) ** 2) for a, b in zip(eps.flatten(), data["noise"].flatten(), strict=True)) / 192
    assert float(out["loss"]) == pytest.approx(wanted, rel=1e-5)
    other = {**data, "pixel_values": data["pixel_values"].flip(0)}
    assert float(made(other)["loss"].detach()) != pytest.approx(wanted, rel=1e-4)


def test_the_loss_of_pdae_by_hand():
    made, data = acting(objective("pdae")).eval(), batch()
    ab = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)[T, None, None, None]
    x_t = (ab.sqrt() * data["pixel_values"] + (1 - ab).sqrt() * data["noise"]).float()
    with torch.no_grad():
        frozen, shift = made.decoder.model.halves(x_t, T, made.encoder(data["pixel_values"]).code)
        out = made(data)
    errors = [(value - data["noise"]).square() for value in (frozen, frozen - shift)]
    snr = ab / (1 - ab)
    assert float(out["frozen_mse"]) == pytest.approx(float(errors[0].mean()), rel=1e-5)
    assert float(out["corrected_mse"]) == pytest.approx(float(errors[1].mean()), rel=1e-5)
    assert float(out["loss"]) == pytest.approx(float((snr**0.1 / (1 + snr) * errors[1]).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["infodiffusion", "kl"])
def test_the_loss_is_the_weighted_sum_of_what_is_logged(kind):
    made, name = acting(objective(kind, penalty_weight=0.3)), {"infodiffusion": "mmd", "kl": "kl"}[kind]
    seeded = batch(generator=torch.Generator().manual_seed(0))
    one = made(seeded)
    again = made({**seeded, "generator": torch.Generator().manual_seed(0)})
    other = made({**seeded, "generator": torch.Generator().manual_seed(1)})
    assert float(one["loss"].detach()) == pytest.approx(float(one["denoising"] + 0.3 * one[name]), rel=1e-6)
    assert torch.equal(one["loss"], again["loss"])
    assert not torch.equal(one["loss"], other["loss"])


def test_a_penalty_of_weight_0_changes_no_bit():
    data = {**batch(), "generator": None}
    plain, penalised = (
        acting(objective("infodiffusion", penalty=name, penalty_weight=0.0)) for name in ("none", "mmd")
    )
    losses, gradients = zip(*(backward(made, data) for made in (plain, penalised)), strict=True)
    assert torch.equal(losses[0]["loss"], losses[1]["loss"])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_a_frozen_base_stays_as_it_is():
    """Trained are encoder, modulation and gradient network; the base is neither changed, nor in training mode."""
    made = acting(objective("pdae")).train()
    base = made.denoiser.model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trained = {name.split(".")[0] for name, p in made.named_parameters() if p.requires_grad}
    assert trained == {"encoder", "film", "gradient"}
    optimizer = torch.optim.AdamW(made.param_groups()[0]["params"], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = made(batch())["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert not any(module.training for module in base.modules())
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert losses[-1] < losses[0]


def test_weights_of_levels_are_positive_with_one_peak():
    schedule = NoiseSchedule.from_scheduler(DDPMScheduler())
    weights = snr_weights(schedule.resolve(torch.arange(1000.0)))
    steps = weights.diff().sign()
    assert (weights > 0).all()
    assert (steps.diff() != 0).sum() == 1
    assert int(weights.argmax()) == 475
    assert weights[[0, 100, 475, 999]].tolist() == pytest.approx([2.5e-4, 0.13, 0.722, 0.36], rel=0.03)
    assert torch.isfinite(snr_weights(schedule.clean_level(-1)))


# Penalties


def mmd_by_loops(x, y, kernel):
    x, y, dim = x.double().tolist(), y.double().tolist(), x.shape[1]

    def k(a, b):
        square = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
        bounds = [2 * dim * scale for scale in (0.5, 1, 2, 4)]
        return sum(c / (c + square) if kernel == "imq" else math.exp(-square / c) for c in bounds)

    def within(rows):
        pairs = [k(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    return within(x) + within(y) - 2 * sum(k(a, b) for a in x for b in y) / (len(x) * len(y))


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_by_loops(kernel):
    x, y = 1 + codes(7), codes(5, seed=9)
    assert float(mmd(x.double(), y.double(), kernel)) == pytest.approx(mmd_by_loops(x, y, kernel), rel=1e-9)


def reference_kernel(x, y):
    """InfoDiffusion's code: biased, and the squared distance divided by D twice."""

    def k(a, b):
        return torch.exp(-(a[:, None] - b[None]).square().mean(2) / a.shape[1]).mean()

    return k(x, x) + k(y, y) - 2 * k(x, y)


@pytest.mark.parametrize("dim", [2, 32, 256])
def test_mmd_sees_mean_and_spread(dim):
    def values(penalty, change):
        drawn = torch.Generator().manual_seed(0)
        pairs = [torch.randn(2, 64, dim, generator=drawn) for _ in range(20)]
        return torch.stack([penalty(change(x), y) for x, y in pairs])

    same = values(mmd, lambda x: x)
    assert abs(same.mean()) < 3 * same.std()
    for change in (lambda x: x + 1, torch.zeros_like):
        assert (values(mmd, change) - same.mean()).min() > 10 * same.std()
    if dim >= 32:
        blind = values(reference_kernel, lambda x: x)
        assert (values(reference_kernel, torch.zeros_like) - blind.mean()).abs().max() < 10 * blind.std()


def test_mmd_pushes_collapsed_codes_apart():
    start = (1e-2 * codes(32)).requires_grad_(True)
    mmd(start, codes(32, seed=9)).backward()
    assert start.grad.isfinite().all()
    moved = start.detach() - 0.1 * start.grad / start.grad.abs().max()
    assert moved.var(0).sum() > start.detach().var(0).sum()
    flat = torch.zeros(4, 6, requires_grad=True)
    mmd(flat, codes(4)).backward()
    assert flat.grad.isfinite().all()
    with pytest.raises(ValueError, match="two rows or more"):
        mmd(codes(1), codes(4))


def test_kl_divergence():
    mean, log_variance = codes(5), codes(5, seed=9)
    normal = distributions.Normal(mean.double(), (log_variance.double() / 2).exp())
    wanted = distributions.kl_divergence(normal, distributions.Normal(0.0, 1.0)).sum(1).mean()
    found = kl_divergence(mean, log_variance)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    doubled = kl_divergence(torch.cat([mean] * 2), torch.cat([log_variance] * 2))
    assert float(doubled) == pytest.approx(float(found), rel=1e-6)
    assert float(kl_divergence(mean, log_variance, capacity=float(found))) == pytest.approx(0, abs=1e-5)
    assert float(kl_divergence(mean, log_variance, capacity=0.0)) == pytest.approx(float(found))


# Other bases


def test_a_latent_base_with_text_is_told_the_empty_prompt():
    from diffusers_repr import Denoiser

    base = Denoiser.from_pipe(build("short_sd"))
    made = acting(objective("pdae", base))
    text = base.condition("", batch=1).kwargs()["encoder_hidden_states"]
    assert torch.equal(made.condition({}, 2)["encoder_hidden_states"], text.expand(2, -1, -1))
    data = {"pixel_values": images(2, 3, base.image_size[0])}
    out, found = backward(made, data)
    assert out["loss"].isfinite()
    assert {name.split(".")[0] for name in found} == {"encoder", "film", "gradient"}


def test_a_class_conditional_base_is_told_its_null_class():
    from diffusers_repr import Denoiser

    base = Denoiser.from_pretrained("examples/models/digits-class-ddim", dtype=torch.float32)
    made = objective("pdae", base)
    assert made.condition({}, 2)["class_labels"].tolist() == [10, 10]
    assert made(batch())["loss"].isfinite()


# What is refused


def test_bad_settings():
    with pytest.raises(ValueError, match="images of 3 channels, the denoiser makes images of 1"):
        DiffusionAutoencoderObjective(denoiser(), encoder(3))
    with pytest.raises(ValueError, match="SemanticEncoder\\(variational=True\\)"):
        DiffusionAutoencoderObjective(denoiser(), encoder(), PenaltyConfig(penalty="kl"))
    made = objective("infodiffusion")
    with pytest.raises(ValueError, match="two or more images a process"):
        made.check_batch({"pixel_values": images(1)})
    with pytest.raises(ValueError, match="`standardize_features: false`"):
        objective("diffae", standardize_features=True).check_batch({"pixel_values": images(1)})
    objective("diffae").check_batch({"pixel_values": images(1)})
    with pytest.raises(ValueError, match="not on cached latents"):
        made.check_batch({"moments": images()})
    with pytest.raises(ValueError, match="trained later"):
        objective("diffae").preview(None, 1, torch.Generator(), 1)
    with pytest.warns(UserWarning, match=r"8.1% of the image is left"):
        objective("infodiffusion", denoiser(unet(), DDPMScheduler(beta_start=1e-5, beta_end=1e-2)))


@pytest.mark.parametrize(("settings", "message"), [
    ({}, "needs `sample_size`"),
    ({"model": {"sample_size": 8}, "frozen_base": True}, "name one by `pretrained_model_name_or_path`"),
    ({"pretrained_model_name_or_path": "base", "model": {"sample_size": 8}}, "brings its own"),
    ({"model": {"sample_size": 8}, "encoder": {"in_channels": 1}}, "leave them out"),
    ({"model": {"sample_size": 8}, "encoder": {"code": 1}}, "Unknown key 'code'"),
    ({"model": {"sample_size": 8}, "penalty": "mmd", "kl_capacity": 1.0}, "of `penalty: kl`"),
    ({"model": {"sample_size": 8}, "penalty": "gan"}, "`penalty` is one of none, mmd, kl"),
    ({"model": {"sample_size": 8}, "penalty_weight": -1.0}, "0 or more"),
    ({"model": {"sample_size": 8}, "modulation": "shift"}, "one of scale, scale_shift"),
])  # fmt: skip
def test_bad_recipes(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionAutoencoderConfig(**settings)


def test_an_encoder_of_a_recipe():
    config = DiffusionAutoencoderConfig(model={"sample_size": 8}, penalty="kl", encoder={"code_dim": 4})
    made = config.new_encoder(1, (8, 8))
    assert isinstance(made, SemanticEncoder)
    assert made.config.variational
    assert (made.config.in_channels, made.config.sample_size, made.config.code_dim) == (1, 8, 4)
