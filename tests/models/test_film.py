"""The code's way into a U-Net, and the decoder half that runs on another's encoder: against plain forwards."""

import copy

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffusers_repr.capture.film import Modulated
from diffusers_repr.capture.semantic_decoder import SemanticDecoder, gradient_coefficients
from diffusers_repr.models import FiLM, GradientUNet, SemanticEncoder, film_blocks
from diffusers_repr.noise import NoiseSchedule
from tests.objectives.autoencoder_cases import D, codes, encoder, text_unet, unet
from tests.objectives.cases import shake

SCHEDULE = NoiseSchedule.from_scheduler(DDPMScheduler())
T = torch.tensor([3, 400, 990])


def inputs(network, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, network.config.in_channels, 8, 8, generator=generator)
    text = isinstance(network, UNet2DModel)
    return x, {} if text else {"encoder_hidden_states": torch.randn(3, 5, 12, generator=generator)}


BASES = {"scale_shift": unet, "additive": lambda: unet("default"), "text": text_unet}


@pytest.mark.parametrize("modulation", ["scale", "scale_shift"])
@pytest.mark.parametrize("base", BASES)
def test_a_new_modulation_changes_no_bit(base, modulation):
    network = BASES[base]()
    film = FiLM(D, film_blocks(network), modulation)
    x, text = inputs(network)
    with torch.no_grad():
        wanted = network(x, T, **text).sample
        for code in (codes(), 1e3 * codes(seed=6)):
            assert torch.equal(SemanticDecoder(network, film)(x, T, code, **text)[0], wanted)
        shaken = SemanticDecoder(network, shake(film))
        assert not torch.equal(shaken(x, T, codes(), **text)[0], wanted)
        assert torch.equal(network(x, T, **text).sample, wanted)  # no hook is left
    shifts = [shift for _, shift in film(codes()).values()]
    assert all((shift is None) == (modulation == "scale") for shift in shifts)


@pytest.mark.parametrize("time", ["scale_shift", "default"])
def test_a_block_equals_both_affine_maps_written_out(time):
    torch.manual_seed(0)
    block = ResnetBlock2D(
        in_channels=8, out_channels=12, temb_channels=10, groups=4, time_embedding_norm=time
    ).double()
    x, temb = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 10).double()
    scale, shift = torch.randn(2, 12).double(), torch.randn(2, 12).double()
    net = nn.ModuleDict({"block": block})
    with torch.no_grad():
        with Modulated(net, ["block"]).applied({"block": (scale, shift)}):
            got = block(x, temb)
        silu = nn.functional.silu
        h, told = block.conv1(silu(block.norm1(x))), block.time_emb_proj(silu(temb))[:, :, None, None]
        if time == "default":
            h = block.norm2(h + told)
        else:
            ts, tb = told.chunk(2, dim=1)
            h = block.norm2(h) * (1 + ts) + tb
        h = (1 + scale[:, :, None, None]) * h + shift[:, :, None, None]
        wanted = block.conv_shortcut(x) + block.conv2(silu(h))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def test_a_code_of_another_width_is_refused():
    film = FiLM(D, film_blocks(unet()))
    with pytest.raises(ValueError, match=r"codes \(B, 6\); got \(3, 7\)"):
        film(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="no residual block"):
        film_blocks(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="not of one autoencoder"):
        SemanticDecoder(unet(block_out_channels=(8, 24)), film)
    with pytest.raises(ValueError, match="trained with codes"):
        SemanticDecoder(unet(), film)(*inputs(unet())[:1], T)


# The gradient network


@pytest.mark.parametrize("base", BASES)
def test_a_gradient_network_equals_a_whole_unet_with_its_decoder(base):
    """The oracle is a stock U-Net: the base's encoder half, and the decoder half of the gradient network."""
    network = BASES[base]()
    gradient = shake(GradientUNet.of(network), 4, 0.1).eval()
    whole = copy.deepcopy(network)
    whole.load_state_dict({**network.state_dict(), **gradient.unet.state_dict()})
    decoder = SemanticDecoder(network, FiLM(D, film_blocks(gradient.unet)), gradient, SCHEDULE)
    x, text = inputs(network)
    with torch.no_grad():
        frozen, shift = decoder.halves(x, T, codes(), **text)
        assert torch.equal(frozen, network(x, T, **text).sample)
        c = gradient_coefficients(SCHEDULE)[T + 1].float()[:, None, None, None]
        torch.testing.assert_close(shift, c * whole(x, T, **text).sample, rtol=1e-6, atol=1e-7)
        assert torch.equal(decoder(x, T, codes(), **text)[0], frozen - shift)
        assert torch.equal(decoder(x, T, **text)[0], frozen)


def test_a_new_gradient_network_gives_exactly_nothing():
    network = unet()
    gradient = GradientUNet.of(network).eval()
    film = shake(FiLM(D, film_blocks(gradient.unet)))
    decoder, (x, _) = SemanticDecoder(network, film, gradient, SCHEDULE), inputs(network)
    with torch.no_grad():
        frozen, shift = decoder.halves(x, T, 100 * codes())
        assert not shift.any()
        assert torch.equal(decoder(x, T, 100 * codes())[0], network(x, T).sample)
    names = {name.split(".")[1] for name, _ in gradient.named_parameters()}
    assert names == {"mid_block", "up_blocks", "conv_norm_out", "conv_out"}


def test_the_coefficients_are_those_of_the_posterior():
    """k_t = sqrt(a_t) sqrt(1 - ab_t) / beta_t S_t, from betas by a loop; k_0 = 0."""
    betas, kept, wanted = DDPMScheduler().betas.double(), 1.0, [0.0]
    for beta in betas.tolist():
        before, kept = kept, kept * (1 - beta)
        variance = beta * (1 - before) / (1 - kept)
        wanted.append((1 - beta) ** 0.5 * (1 - kept) ** 0.5 / beta * variance)
    found = gradient_coefficients(SCHEDULE)
    assert found[:2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-11, atol=1e-12)
    ratio = found[1:] / gradient_coefficients(SCHEDULE, "score")[1:]
    shown = [0.455, 0.611, 0.778, 0.864, 0.921, 0.964, 0.981]
    assert ratio[[1, 2, 5, 10, 20, 50, 100]].tolist() == pytest.approx(shown, abs=6e-4)


def test_the_output_is_in_the_form_of_the_bases():
    """A base that predicts v: its noise, less c G, is what the noise of the returned v is."""
    network = unet()
    gradient = shake(GradientUNet.of(network), 4, 0.1).eval()
    v = NoiseSchedule.from_scheduler(DDPMScheduler(prediction_type="v_prediction"))
    decoder = SemanticDecoder(network, FiLM(D, film_blocks(gradient.unet)), gradient, v)
    x, _ = inputs(network)
    ab = DDPMScheduler().alphas_cumprod[T][:, None, None, None]
    with torch.no_grad():
        frozen, shift = decoder.halves(x, T, codes())
        torch.testing.assert_close(frozen, ab.sqrt() * network(x, T).sample + (1 - ab).sqrt() * x)
        back = ab.sqrt() * decoder(x, T, codes())[0] + (1 - ab).sqrt() * x
    torch.testing.assert_close(back, frozen - shift, rtol=1e-4, atol=1e-4)


def test_channels_last_halves_reach_the_backward_pass():
    """torch's group norm crashes on a channels-last input without a gradient; what is handed over is not."""
    network = unet().to(memory_format=torch.channels_last)
    gradient = shake(GradientUNet.of(network), 4, 0.1)
    decoder = SemanticDecoder(network, FiLM(D, film_blocks(gradient.unet)), gradient, SCHEDULE)
    x = inputs(network)[0].to(memory_format=torch.channels_last)
    decoder.halves(x, T, codes())[1].square().mean().backward()
    assert all(p.grad is not None for p in gradient.parameters())
    assert all(p.grad is None for p in network.parameters())


def test_bases_that_cannot_be_cut_are_refused():
    blocks = {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2}
    skips = UNet2DModel(8, 1, 1, block_out_channels=(32, 32), layers_per_block=1, norm_num_groups=8, **blocks)
    with pytest.raises(ValueError, match="SkipDownBlock2D, SkipUpBlock2D: beside the activations they carry an image"):
        GradientUNet.of(skips)
    with pytest.raises(ValueError, match="has no mid_block"):
        GradientUNet.of(unet(mid_block_type=None))
    with pytest.raises(ValueError, match="UNet2DModel or UNet2DConditionModel; got 'UNet3D'"):
        GradientUNet("UNet3D", {})
    flow = NoiseSchedule("flow", "velocity")
    with pytest.raises(ValueError, match="process is flow"):
        gradient_coefficients(flow)


@pytest.mark.parametrize("modulated", ["unet", "gradient"])
def test_gradient_checkpointing_changes_no_gradient(modulated):
    """The backward pass computes the blocks again, after the forward: they must be modulated then too."""
    network = unet()
    gradient = shake(GradientUNet.of(network), 4, 0.1) if modulated == "gradient" else None
    part = network if gradient is None else gradient
    film = shake(FiLM(D, film_blocks(network if gradient is None else gradient.unet)), 3)
    decoder, (x, _), found = SemanticDecoder(network, film, gradient, SCHEDULE).train(), inputs(network), []
    for checkpointing in (False, True):
        if checkpointing:
            part.enable_gradient_checkpointing()
        decoder.zero_grad()
        decoder(x, T, codes())[0].square().mean().backward()
        found.append([p.grad.clone() for p in (*part.parameters(), *film.parameters()) if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 20
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    part.disable_gradient_checkpointing()
    with torch.no_grad():
        decoder(x, T, codes())  # takes the hooks that stayed away
        assert not any(module._forward_hooks for module in part.modules())


# The encoder


def test_the_code_is_the_mean_of_the_places_and_a_linear_map_of_the_pooled():
    """As DiffAE has it: pooled first, then the linear layer."""
    made = encoder(variational=True).eval()
    with torch.no_grad():
        x = torch.randn(3, 1, 8, 6, generator=torch.Generator().manual_seed(0))
        found = made(x)
        pooled = pooled_features(made, x)
        both = pooled @ made.proj_out.weight[:, :, 0, 0].T + made.proj_out.bias
    torch.testing.assert_close(torch.cat([found.code, found.log_variance], 1), both, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.map.mean((2, 3)), found.code, rtol=1e-5, atol=1e-6)
    assert tuple(found.map.shape[2:]) == made.grid((8, 6)) == (4, 3)
    assert made.grid((9, 5)) == (5, 3)
    drawn = torch.stack([found.sample(torch.Generator().manual_seed(seed)) for seed in range(400)])
    std = (found.log_variance / 2).exp()
    assert ((drawn.std(0) / std - 1).abs() < 0.2).all()
    assert ((drawn.mean(0) - found.code).abs() < 5 * std / 20).all()
    with pytest.raises(ValueError, match=r"images \(B, 1, H, W\); got \(1, 3, 8, 8\)"):
        made(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="multiple of norm_num_groups"):
        SemanticEncoder(1, 4, block_out_channels=(6, 8), norm_num_groups=4)


def test_features_are_standardised_as_by_a_batch_norm_without_weights():
    made = encoder(standardize_features=True).train()
    with torch.no_grad():
        x = torch.randn(3, 1, 8, 6, generator=torch.Generator().manual_seed(0))
        pooled = pooled_features(made, x)
        norm = nn.BatchNorm1d(pooled.shape[1], affine=False)
        weight, bias = made.proj_out.weight[:, :, 0, 0], made.proj_out.bias
        torch.testing.assert_close(made(x).code, norm(pooled) @ weight.T + bias, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made.feature_mean, norm.running_mean)
        torch.testing.assert_close(made.feature_var, norm.running_var)
        expected = norm.eval()(pooled) @ weight.T + bias
        torch.testing.assert_close(made.eval()(x).code, expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="two images or more"):
            made.train()(x[:1])
    assert "feature_mean" not in encoder().state_dict()


def pooled_features(made, x):
    hidden = made.conv_in(x)
    for block in made.down_blocks:
        hidden = block(hidden)
    return nn.functional.silu(made.norm_out(made.mid_block(hidden))).mean((2, 3))
