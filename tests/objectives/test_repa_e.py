import copy
import math

import pytest
import torch
from diffusers_repr.pipelines.sit import SiTPipeline
from diffusers_repr.schedulers_ext.scheduling_flow_match_ode import FlowMatchODEScheduler
from torch import nn

from diffusers_repr import Denoiser
from diffusers_repr.denoiser.vae import decode_latents, encode_latents
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.objectives.repa.latent_norm import LatentNorm
from diffusers_repr.objectives.repa.repa_e import REPAEObjective
from diffusers_repr.objectives.repa.vae_statistics import latent_statistics, write_statistics
from tests.objectives.cases import LINEAR, SMALL, batch, shake, sit, teacher
from tests.testers.models import autoencoder, build


def denoiser(**vae_changes) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        vae = autoencoder((8,), latent_channels=3, scaling_factor=0.7, sample_size=8, **vae_changes)
        model = sit().model
    return Denoiser.from_pipe(SiTPipeline(model, FlowMatchODEScheduler(), vae))


def repa_e(**options) -> REPAEObjective:
    torch.manual_seed(1)
    options = {**SMALL, "label_dropout": 0.0, **options}
    return REPAEObjective(denoiser(), [teacher()], "blocks.1", **options)


def nonzero(part: nn.Module) -> bool:
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in part.parameters())


def step(objective, data, optimizers=None):
    """One step of each phase; gives the losses."""
    out = {}
    for phase in objective.phases:
        objective.zero_grad()
        out[phase] = objective(data, phase=phase)
        out[phase]["loss"].backward()
        if optimizers:
            optimizers[phase].step()
    return out


# Which loss reaches what: D2's checks


def test_each_phase_reaches_its_own_part():
    objective = repa_e(adversarial=nn.Conv2d(3, 1, 3)).train()
    data = batch()
    parts = {"vae": objective.vae, "discriminator": objective.adversarial, "main": objective.network}
    for phase in objective.phases:
        objective.zero_grad()
        objective(data, phase=phase)["loss"].backward()
        assert {name: nonzero(part) for name, part in parts.items()} == {name: name == phase for name in parts}
        assert nonzero(objective.losses) == (phase == "main")
        norm = objective.latent_norm.training
        assert (objective.network.training, norm, objective.vae.training) == (*[phase == "main"] * 2, phase == "vae")


def test_the_diffusion_loss_does_not_reach_the_vae_and_the_alignment_does():
    objective = repa_e(kl_weight=0.0)
    objective.vae_weights["reconstruction"] = 0.0
    objective(batch(), phase="vae")["loss"].backward()
    assert nonzero(objective.vae.encoder)
    assert not nonzero(objective.vae.decoder)
    objective.zero_grad()
    objective(batch(), phase="main")["loss"].backward()
    assert all(p.grad is None for p in objective.vae.parameters())


def test_without_alignment_the_first_phase_trains_a_plain_vae():
    objective = repa_e(vae_coefficient=0.0, kl_weight=0.01)
    data = batch()
    torch.manual_seed(3)
    out = objective(data, phase="vae")
    out["loss"].backward()
    vae = copy.deepcopy(denoiser().vae)
    torch.manual_seed(3)
    posterior = vae.encode(data["pixel_values"]).latent_dist
    reconstruction = vae.decode(posterior.sample()).sample
    loss = (reconstruction - data["pixel_values"]).abs().mean() + 0.01 * posterior.kl().mean()
    loss.backward()
    assert out["loss"].item() == pytest.approx(loss.item(), abs=1e-6)
    for (name, mine), theirs in zip(objective.vae.named_parameters(), vae.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6), name


def test_the_losses_of_the_vae_add_up():
    class Squared(nn.Module):
        def forward(self, one, other):
            return (one - other).square().mean((1, 2, 3))

    objective = repa_e(perceptual=Squared(), adversarial=nn.Conv2d(3, 1, 3))
    out = objective(batch(), phase="vae")
    weights = {"reconstruction": 1, "kl": 1e-6, "perceptual": 1, "adversarial": 0.1, "alignment": 1.5}
    assert sorted(out) == sorted([*weights, "loss"])
    total = sum(weight * out[name].item() for name, weight in weights.items())
    assert out["loss"].item() == pytest.approx(total, abs=1e-5)
    assert "perceptual" in objective.frozen


# Phases share latents, times and noise


def test_the_network_sees_the_latents_of_the_vae_before_its_update():
    objective = repa_e().train()
    data = batch()
    objective(data, phase="vae")["loss"].backward()
    kept = objective._kept[0]
    with torch.no_grad():
        for parameter in objective.vae.parameters():
            parameter += 1.0
    seen = []
    objective.network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    objective(data, phase="main")
    latents = kept.latents
    mean, var = latents.mean((0, 2, 3), keepdim=True), latents.var((0, 2, 3), unbiased=False, keepdim=True)
    x0 = (latents - mean) / torch.sqrt(var + 1e-4)
    t = (kept.level.timestep / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(seen[0]["hidden_states"], (1 - t) * x0 + t * kept.noise, atol=1e-5)
    assert torch.allclose(seen[0]["timestep"], kept.level.timestep)
    assert objective._kept == {}


def test_micro_batches_are_told_apart():
    objective = repa_e()
    for micro in (0, 1):
        objective({**batch(seed=micro), "micro": micro}, phase="vae")
    assert not torch.equal(objective._kept[0].latents, objective._kept[1].latents)
    objective({**batch(seed=1), "micro": 1}, phase="main")
    assert list(objective._kept) == [0]
    objective.on_step_end(1, None)
    assert objective._kept == {}


def test_the_prefix_gives_the_whole_forwards_gradients():
    grads = []
    for checkpointing in (False, True):  # with it the network runs to its end
        objective = repa_e().train()
        if checkpointing:
            objective.network.enable_gradient_checkpointing()
        torch.manual_seed(2)
        objective(batch(), phase="vae")["loss"].backward()
        grads.append([p.grad.clone() for p in objective.vae.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*grads, strict=True))


def test_it_trains():
    objective = repa_e(vae_coefficient=0.5).train()
    optimizers = {
        phase: torch.optim.AdamW(objective.param_groups(phase)[0]["params"], 3e-3) for phase in objective.phases
    }
    data = batch(4)
    first = step(objective, data)
    for _ in range(15):
        last = step(objective, data, optimizers)
    assert last["vae"]["reconstruction"] < first["vae"]["reconstruction"]
    assert last["main"]["alignment"] < first["main"]["alignment"]


# Latent statistics


def test_latent_norm_is_batch_norm():
    norm, plain = LatentNorm(3), nn.BatchNorm2d(3, affine=False, eps=1e-4, momentum=0.1)
    for _ in range(3):
        z = torch.randn(4, 3, 5, 5) * 3 + 2
        out = norm(z)
        assert torch.allclose(out, plain(z), atol=1e-5)
        assert out.mean((0, 2, 3)).abs().max() < 1e-5
        assert torch.allclose(out.var((0, 2, 3), unbiased=False), torch.ones(3), atol=1e-3)
    assert torch.allclose(norm.mean, plain.running_mean, atol=1e-6)
    assert torch.allclose(norm.var, plain.running_var, atol=1e-5)
    norm.eval(), plain.eval()
    assert torch.allclose(norm(z), plain(z), atol=1e-5)
    assert torch.allclose(norm.invert(norm(z)), z, atol=1e-5)


def test_statistics_start_as_the_config_says():
    norm = repa_e().latent_norm
    assert torch.allclose(norm.var.sqrt(), torch.full((3,), 1 / 0.7))
    vae = autoencoder((8,), latent_channels=2, latents_mean=[1.0, 2.0], latents_std=[3.0, 4.0], scaling_factor=0.5)
    mean, std = latent_statistics(vae)
    assert (list(mean), std.tolist()) == ([1.0, 2.0], [6.0, 8.0])


@pytest.mark.parametrize("convolutions", [True, False])
def test_the_saved_pipeline_decodes_normalised_latents(tmp_path, convolutions):
    options = {} if convolutions else {"use_quant_conv": False, "use_post_quant_conv": False}
    objective = REPAEObjective(denoiser(**options), [teacher()], "blocks.1", **SMALL)
    objective.latent_norm.set_statistics([0.3, -0.4, 2.0], [0.5, 2.0, 1.5])
    shake(objective.vae, 9, 0.1)
    state = objective.trained_state()
    assert {"latent_norm.mean", "vae.encoder.conv_in.weight"} <= state.keys()
    objective.save_pretrained(tmp_path, state, torch.float32)
    pipe = SiTPipeline.from_pretrained(tmp_path)
    z = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = objective.vae.decode(objective.latent_norm.eval().invert(z)).sample
        assert torch.allclose(decode_latents(pipe.vae, z), wanted, atol=1e-4)
        x = batch()["pixel_values"]
        clean = objective.latent_norm(objective.vae.encode(x).latent_dist.mode())
        assert torch.allclose(encode_latents(pipe.vae, x), clean, atol=1e-3)
        posterior = objective.vae.encode(x).latent_dist
        scale = torch.sqrt(objective.latent_norm.var + 1e-4).view(1, -1, 1, 1)
        if convolutions:
            assert torch.allclose(pipe.vae.encode(x).latent_dist.std, posterior.std / scale, rtol=1e-3)
            assert pipe.vae.config["scaling_factor"] == 1.0


def test_a_pipeline_that_reads_no_statistics_is_refused():
    vae = autoencoder((8,), latent_channels=2, use_quant_conv=False, use_post_quant_conv=False)
    with pytest.raises(TypeError, match="DiTPipeline reads no statistics"):
        write_statistics(vae, torch.zeros(2).double(), torch.ones(2).double(), type(build("dit")))


def test_the_average_covers_the_statistics():
    from diffusers_repr.training.ema import EMA

    objective = repa_e().train()
    ema = EMA(objective, decay=0.5, warmup=False)
    assert {"latent_norm.mean", "latent_norm.var"} <= ema.shadow.keys()
    assert not any(name.startswith("vae.") for name in ema.shadow)
    before = ema.shadow["latent_norm.mean"].clone()
    step(objective, batch())
    ema.step()
    wanted = (before + objective.latent_norm.mean) / 2
    assert torch.allclose(ema.shadow["latent_norm.mean"], wanted)
    assert wanted.abs().max() > 0


# State and bad input


def test_state_and_groups_do_not_depend_on_the_phase():
    objective = repa_e(adversarial=nn.Conv2d(3, 1, 3)).train()
    keys = objective.trained_state().keys()
    groups = {phase: len(objective.param_groups(phase)[0]["params"]) for phase in objective.phases}
    assert sum(groups.values()) == len(list(objective.parameters()))
    objective(batch(), phase="vae")
    assert objective.trained_state().keys() == keys
    assert {phase: len(objective.param_groups(phase)[0]["params"]) for phase in objective.phases} == groups
    assert any(key.startswith("vae.") for key in keys)
    assert any(key.startswith("network.") for key in keys)


def test_bad_input():
    with pytest.raises(ValueError, match="the denoiser has none"):
        REPAEObjective(sit(), [teacher()], "blocks.1")
    with pytest.raises(ValueError, match="pass encoders"):
        REPAEObjective(denoiser(), [])
    with pytest.raises(ValueError, match="weight of 'kl'"):
        repa_e(kl_weight=math.nan)
    objective = repa_e()
    with pytest.raises(ValueError, match="phase='both'; expected one of vae, main"):
        objective(batch(), phase="both")
    with pytest.raises(ValueError, match="needs the latents of the phase 'vae'"):
        objective(batch(), phase="main")
    with pytest.raises(ValueError, match="not on cached latents"):
        objective.check_batch({"class_labels": torch.tensor([0]), "features": {"teacher": torch.zeros(1, 16, 6)}})
    assert SiTTransformer2DModel is type(objective.network)
    assert objective.denoiser.schedule.output == LINEAR.output
