"""A VAE that is trained to normalised latents: its loss by hand, its scale, its contract."""

import pytest
import torch

from diffusers_repr.denoiser.vae import encode_latents
from diffusers_repr.objectives import AutoencoderConfig, AutoencoderObjective
from diffusers_repr.objectives.autoencoder import new_autoencoder
from diffusers_repr.testing import check_objective

MODEL = {"sample_size": 8, "block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2,
         "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4, "latent_channels": 2}  # fmt: skip


def images() -> torch.Tensor:
    return torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def made(**changes) -> AutoencoderObjective:
    torch.manual_seed(0)
    return AutoencoderObjective(new_autoencoder(AutoencoderConfig(MODEL, **changes)), kl_weight=0.1)


def test_the_contract_and_the_loss_by_hand():
    objective = made()
    check_objective(objective, {"pixel_values": images()})
    out = objective({"pixel_values": images(), "generator": torch.Generator().manual_seed(2)})
    moments = objective.vae.quant_conv(objective.vae.encoder(images())).double()
    mean, log_var = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(2))
    latents = mean + (log_var / 2).exp() * noise
    kl = ((mean**2 + log_var.exp() - 1 - log_var) / 2).sum((1, 2, 3)).mean()
    l1 = (objective.vae.decode(latents.float()).sample - images()).abs().mean()
    assert float(out["kl"]) == pytest.approx(float(kl), rel=1e-4)
    assert float(out["loss"]) == pytest.approx(float(l1 + 0.1 * kl), rel=1e-4)
    with pytest.raises(ValueError, match="not on cached latents"):
        objective.check_batch({"moments": torch.zeros(1)})


def test_what_is_saved_gives_latents_of_unit_scale(tmp_path):
    objective = made(initial_std=0.01)
    objective.latent_norm.momentum = 1.0
    with torch.no_grad():
        objective.vae.quant_conv.weight[:2] *= 20
        objective.vae.quant_conv.bias[:2] += 3
        objective.latent_norm(objective.vae.encode(images()).latent_dist.sample())
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    saved = type(objective.vae).from_pretrained(tmp_path)
    latents = encode_latents(saved, images())
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(2), atol=0.05, rtol=0)
    trained = objective.vae.decode(objective.vae.encode(images()).latent_dist.mode()).sample
    torch.testing.assert_close(saved.decode(latents).sample, trained, atol=1e-3, rtol=1e-3)


def test_noise_at_the_start():
    std = made(initial_std=0.05).vae.encode(images()).latent_dist.std
    assert 0.02 < float(std.median()) < 0.12


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "needs `sample_size`"),
        ({"model": MODEL | {"use_quant_conv": False}}, "hold the latents' scale"),
        ({"model": MODEL | {"chanels": 3}}, "Unknown key 'chanels'"),
        ({"kl_weight": -1.0}, "`kl_weight` is 0 or more"),
        ({"initial_std": 0.0}, "`initial_std` above 0"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**{"model": MODEL} | changes)
