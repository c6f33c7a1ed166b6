"""The noisy classifier against diffusers' own U-Net, finite differences and closed forms; whose base it refuses."""

import json
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)

from diffusers_repr.models import NoisyClassifier, describe_process
from diffusers_repr.noise import NoiseSchedule

TINY = {
    "in_channels": 2,
    "num_classes": 3,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}


def tiny(seed: int = 0, **changes) -> NoisyClassifier:
    torch.manual_seed(seed)
    model = NoisyClassifier(**TINY | changes).eval()
    with torch.no_grad():  # away from the zeros and ones that norms and biases start at
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vp(**changes) -> NoiseSchedule:
    return NoiseSchedule.from_scheduler(DDPMScheduler(**changes))


SCHEDULES = {
    "vp": vp(),
    "vp_scaled": vp(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    "vp_cosine": vp(beta_schedule="squaredcos_cap_v2"),
    "vp_zero_snr": vp(rescale_betas_zero_snr=True),
    "vp_short": vp(num_train_timesteps=100),
    "flow": NoiseSchedule("flow", "velocity"),
    "flow_short": NoiseSchedule("flow", "velocity", 100),
    "edm": NoiseSchedule.from_scheduler(EDMEulerScheduler()),
    "edm_wide": NoiseSchedule.from_scheduler(EDMEulerScheduler(sigma_data=1.0)),
    "ve": NoiseSchedule.from_scheduler(ScoreSdeVeScheduler()),
}


# --- the network


@pytest.mark.parametrize("shift", ["scale_shift", "default"])
def test_is_the_downsampling_half_of_a_unet(shift):
    ours = tiny(pooling="mean", resnet_time_scale_shift=shift)
    unet = UNet2DModel(
        in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attn_norm_num_groups=4, attention_head_dim=8, resnet_time_scale_shift=shift,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    half = {name: p for name, p in ours.state_dict().items() if not name.startswith(("classifier", "conv_norm_out"))}
    unet.load_state_dict(unet.state_dict() | half)
    middle = []
    unet.mid_block.register_forward_hook(lambda module, args, output: middle.append(output))
    x_t, timestep = torch.randn(2, 2, 12, 8), torch.tensor([3, 900])
    with torch.no_grad():
        unet(x_t, timestep)
        logits = ours(x_t, timestep)
    normed = torch.nn.functional.group_norm(middle[0], 4, ours.conv_norm_out.weight, ours.conv_norm_out.bias, 1e-5)
    pooled = (normed * torch.sigmoid(normed)).mean((2, 3))
    torch.testing.assert_close(logits, pooled @ ours.classifier.weight.T + ours.classifier.bias)


def test_attention_pooling_equals_a_loop_over_heads():
    model = tiny().double()
    seen = []
    model.conv_norm_out.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        logits = model(torch.randn(1, 2, 6, 8).double(), 5)
        places = torch.nn.functional.silu(seen[0])[0].flatten(1).T  # (N, C)
        tokens = torch.cat([places.mean(0, keepdim=True), places])
        query, key, value = (layer(tokens) for layer in (model.pool.to_q, model.pool.to_k, model.pool.to_v))
        heads = []
        for start in (0, 8):
            part = slice(start, start + 8)
            weights = torch.softmax(key[:, part] @ query[0, part] / math.sqrt(8), dim=0)
            heads.append(weights @ value[:, part])
        pooled = model.pool.to_out[0](torch.cat(heads))
    torch.testing.assert_close(logits[0], model.classifier(pooled))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_gradient_equals_finite_differences(pooling):
    """Of log p(c | x_t), along random directions, in float64."""
    model = tiny(pooling=pooling).double()
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(3, 2, 5, 4, generator=generator, dtype=torch.float64)
    labels, timestep = torch.tensor([0, 2, 1]), torch.tensor([0, 333, 999])

    def log_p(x):
        logits = model(x, timestep)
        assert logits.dtype == torch.float64
        return logits.log_softmax(1).gather(1, labels[:, None]).squeeze(1)

    gradient = torch.autograd.grad(log_p(x_t.requires_grad_()).sum(), x_t)[0]
    assert gradient.flatten(1).norm(dim=1).min() > 1e-6
    for _ in range(4):
        direction = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            slope = (log_p(x_t + 1e-5 * direction) - log_p(x_t - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope, rtol=1e-6, atol=1e-9)


def test_samples_do_not_see_each_other():
    model, x_t, timestep = tiny(), torch.randn(3, 2, 8, 8), torch.tensor([1.0, 500.5, 999.0])
    with torch.no_grad():
        whole = model(x_t, timestep)
        alone = torch.cat([model(x_t[i : i + 1], float(timestep[i])) for i in range(3)])
    torch.testing.assert_close(whole, alone)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_the_timestep_matters_and_one_serves_all():
    model, x_t = tiny(), torch.randn(1, 2, 8, 8).expand(2, -1, -1, -1)
    with torch.no_grad():
        logits = model(x_t, torch.tensor([10, 700]))
        assert (logits[0] - logits[1]).abs().max() > 1e-3
        assert torch.equal(model(x_t, 10), model(x_t, torch.tensor([10, 10])))
        assert not torch.equal(model(x_t, 10.25), model(x_t, 10))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3), (16, 4)])
def test_any_height_and_width(size):
    assert tiny()(torch.randn(2, 2, *size), 3).shape == (2, 3)


def test_logits_are_float32_under_autocast():
    model, seen = tiny(pooling="mean"), []
    model.conv_norm_out.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.randn(2, 2, 8, 8), 100)
    assert logits.dtype == torch.float32
    pooled = torch.nn.functional.silu(seen[0]).mean((2, 3)).float()
    torch.testing.assert_close(logits, pooled @ model.classifier.weight.T + model.classifier.bias)


# --- saving


def test_round_trip(tmp_path):
    model = tiny(
        id2label=["a", "b", "c"], base_model="user/base", sample_size=(12, 8), **describe_process(SCHEDULES["vp"])
    )
    model.save_pretrained(tmp_path)
    files = ["config.json", "diffusers_repr_noisy_classifier.py", "diffusion_pytorch_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    loaded = NoisyClassifier.from_pretrained(tmp_path)
    assert loaded.labels == ["a", "b", "c"]
    assert loaded.config.base_model == "user/base"
    assert dict(loaded.config.noise_schedule) == describe_process(SCHEDULES["vp"])["noise_schedule"]


def test_labels():
    assert tiny().labels == ["0", "1", "2"]
    assert tiny(id2label={2: "z", "0": "x", 1: "y"}).labels == ["x", "y", "z"]
    assert dict(tiny(id2label={2: "z", "0": "x", 1: "y"}).config.id2label) == {"0": "x", "1": "y", "2": "z"}


# --- the base


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_the_process_of_training_is_accepted(name):
    described = json.loads(json.dumps(describe_process(SCHEDULES[name]), allow_nan=False))
    model = tiny(base_model="user/base", **described)
    model.check_base(SCHEDULES[name], 2)
    for other, schedule in SCHEDULES.items():
        if other != name:
            with pytest.raises(
                ValueError, match="has the noise process .*; the classifier was trained on .* .'user/base'.: the same"
            ):
                model.check_base(schedule, 2)


def test_what_the_network_predicts_and_the_sampler_do_not_matter():
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    model = tiny(**describe_process(vp(**betas)))
    for scheduler in (
        DDIMScheduler(**betas, timestep_spacing="trailing"),
        DDPMScheduler(**betas, prediction_type="v_prediction"),
        EulerDiscreteScheduler(**betas),
    ):
        model.check_base(NoiseSchedule.from_scheduler(scheduler), 2)
    shifted = FlowMatchEulerDiscreteScheduler(shift=3.0)
    tiny(**describe_process(SCHEDULES["flow"])).check_base(NoiseSchedule.from_scheduler(shifted), 2)


def test_the_description_is_the_log_snr():
    described = describe_process(SCHEDULES["vp"])
    alphas = DDPMScheduler().alphas_cumprod.double()
    expected = [0.5 * math.log(float(alphas[t] / (1 - alphas[t]))) for t in (0, 999)]
    values = described["noise_schedule"]["half_log_snr"]
    assert [values[0], values[-1]] == pytest.approx(expected, rel=1e-3)
    assert describe_process(SCHEDULES["vp_zero_snr"])["noise_schedule"]["half_log_snr"][-1] is None
    assert describe_process(SCHEDULES["flow"]) == {"num_train_timesteps": 1000, "noise_schedule": {"kind": "flow"}}


def test_channels_and_latents_of_the_base():
    described = describe_process(SCHEDULES["vp"])
    with pytest.raises(ValueError, match="takes x_0 of 4 channels; the classifier was trained on x_0 of 2"):
        tiny(**described).check_base(SCHEDULES["vp"], 4)
    with pytest.raises(ValueError, match="works on latents scaled by 0.18215; the classifier was trained on pixels"):
        tiny(**described).check_base(SCHEDULES["vp"], 2, latent_scale=0.18215)
    latent = tiny(latent_scale=0.18215, **described)
    latent.check_base(SCHEDULES["vp"], 2, latent_scale=0.18215)
    with pytest.raises(ValueError, match="latents scaled by 0.13025; .* trained on latents scaled by 0.18215"):
        latent.check_base(SCHEDULES["vp"], 2, latent_scale=0.13025)


def test_a_process_that_is_not_told_cannot_be_checked():
    with pytest.raises(ValueError, match="describe_process"):
        tiny().check_base(SCHEDULES["vp"], 2)


# --- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 0}, "num_classes must be a whole number from 1; got 0"),
        ({"in_channels": True}, "in_channels must be"),
        ({"block_out_channels": (8,)}, "one stage each; got 1 and 2"),
        ({"block_out_channels": (), "down_block_types": ()}, "got 0 and 0"),
        ({"block_out_channels": (8, 18)}, "18 must be even and a multiple of norm_num_groups=4 and attention"),
        ({"block_out_channels": (6, 16)}, "6 must be even and a multiple of norm_num_groups=4"),
        ({"block_out_channels": (8, 12), "down_block_types": ("DownBlock2D",) * 2, "mid_block_attention": False},
         "attention_head_dim=8"),
        ({"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}, "Unknown down block.*AttnDownBlock2D"),
        ({"pooling": "max"}, "pooling='max'.*attention, mean"),
        ({"resnet_time_scale_shift": "spatial"}, "scale_shift or default"),
        ({"id2label": ["a", "b"]}, "ids 0 to 2"),
        ({"id2label": {1: "a", 2: "b", 3: "c"}}, "ids 0 to 2"),
    ],
)  # fmt: skip
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        NoisyClassifier(**TINY | changes)


def test_bad_inputs():
    model = tiny()
    with pytest.raises(ValueError, match=r"takes x_t \(B, 2, H, W\); got \(1, 4, 8, 8\)"):
        model(torch.zeros(1, 4, 8, 8), 3)
    with pytest.raises(ValueError, match=r"got \(2, 8, 8\)"):
        model(torch.zeros(2, 8, 8), 3)
    with pytest.raises(ValueError, match="2 timesteps for 3 samples"):
        model(torch.zeros(3, 2, 8, 8), torch.tensor([1, 2]))
