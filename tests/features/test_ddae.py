"""DDAE's layers and levels: its block numbers, its index of noise, EDM's preconditioning."""

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffusers_repr import Denoiser, FeatureExtractor, GenericFamily, NoiseLevel
from diffusers_repr.capture import capture
from diffusers_repr.features import ddae_layers, ddae_levels, pool
from diffusers_repr.features.presets import edm_sigma, presets
from tests.testers.models import build


def network(channels, layers, attends, **changes):
    """Of the CIFAR-10 networks' layout, narrow: attention at the second stage."""
    stages = len(channels)
    kinds = ["AttnDownBlock2D" if at in attends else "DownBlock2D" for at in range(stages)]
    torch.manual_seed(0)
    return UNet2DModel(
        32, 3, 3, block_out_channels=channels, layers_per_block=layers, norm_num_groups=4, attention_head_dim=None,
        down_block_types=kinds, up_block_types=[k.replace("Down", "Up") for k in reversed(kinds)], **changes,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "points"),
    [
        (network((8, 16, 16, 16), 2, [1]), {6: "ddae ddpm-cifar10", 7: "ddae edm-ddpm-cifar10"}),
        (network((8, 8, 8), 4, [1], upsample_type="resnet", downsample_type="resnet"),
         {6: "ddae ddpmpp-cifar10", 7: "ddae edm-ddpmpp-cifar10"}),
    ],
    ids=["ddpm", "ddpm++"],
)  # fmt: skip
def test_block_numbers(model, points):
    """`out_k` is what the k-th residual block on the way up gives, behind its attention: counted as they run."""
    denoiser, ran = Denoiser(model, DDPMScheduler()), []
    names = {module: name for name, module in model.named_modules()}
    for module, name in names.items():
        if name.startswith("up_blocks") and "sampler" not in name and isinstance(module, (ResnetBlock2D, Attention)):
            module.register_forward_hook(lambda module, args, out: ran.append((names[module], out)))
    layers = ddae_layers(denoiser)
    with capture(model, layers) as tape:
        model(torch.randn(1, 3, 32, 32), 10)
    # A block is a residual block, with the attention that runs right behind it.
    blocks = [at for at in range(len(ran)) if at + 1 == len(ran) or "attentions" not in ran[at + 1][0]]
    assert [ran[at][0] for at in blocks] == layers
    assert len(layers) == len(model.up_blocks) * (model.config.layers_per_block + 1)
    for k, at in enumerate(blocks):
        assert torch.equal(tape[layers[k]], ran[at][1])
    for number, name in points.items():
        assert presets(*name.split()).layers == (layers[number - 1],)


def test_transformers_and_others():
    dit = Denoiser.from_pipe(build("dit"))
    assert ddae_layers(dit)[1] == "transformer_blocks.1"
    assert ddae_levels(dit) == [81, 121]
    with pytest.raises(ValueError, match="no up_blocks and no stack"):
        ddae_layers(Denoiser(nn.Conv2d(1, 1, 1), DDPMScheduler(), family=GenericFamily(channels=1)))


def test_noise_of_the_index():
    """The source counts from 1 and has no noise at 0: `alpha_bar` of its table at t is that of ours at t - 1."""
    betas = torch.cat([torch.zeros(1), torch.linspace(1e-4, 0.02, 1000)])
    alpha_bar = torch.cumsum(torch.log(1 - betas), 0).exp()
    assert alpha_bar[0] == 1
    denoiser = Denoiser.from_pipe(build("ddpm"))
    for theirs, ours in zip((1, 11, 21), ddae_levels(denoiser), strict=True):
        assert ours == theirs - 1
        assert float(denoiser.level(ours).alpha) == pytest.approx(float(alpha_bar[theirs].sqrt()), rel=1e-6)
    flow = Denoiser(Zero(), FlowMatchEulerDiscreteScheduler(), family=GenericFamily(channels=1))
    nsr = [float((1 / alpha_bar[t] - 1).sqrt()) for t in (1, 11, 21)]
    assert [float(flow.level(level).nsr) for level in ddae_levels(flow)] == pytest.approx(nsr, rel=1e-4)


class Zero(nn.Module):
    """Returns zeros, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()

    def forward(self, sample, timestep):
        self.told = timestep
        return 0 * self.identity(sample)


def test_edm_preconditioning():
    """A zero network denoises to `c_skip x`; its layers see `x_sigma / sqrt(sigma^2 + 1/4)` and `ln(sigma) / 4`."""
    denoiser = Denoiser(Zero(), EDMEulerScheduler(), family=GenericFamily(channels=1))
    levels = ddae_levels(denoiser)
    assert [level.nsr for level in levels] == [edm_sigma(3), edm_sigma(4), edm_sigma(5)]
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 2, 1, 4, 4, generator=generator)
    for index in range(1, 19):
        sigma = edm_sigma(index)
        level = denoiser.level(NoiseLevel(nsr=sigma))
        x_sigma = x0 + sigma * noise
        x_t = denoiser.add_noise(x0, level, noise)
        with capture(denoiser.model, "identity", stop_early=False) as tape:
            prediction = denoiser.predict(x_t, level, {})
        assert torch.allclose(tape["identity"], x_sigma / (sigma**2 + 0.25) ** 0.5, rtol=1e-5, atol=1e-6)
        assert torch.allclose(prediction.x0, 0.25 / (sigma**2 + 0.25) * x_sigma, rtol=1e-4, atol=1e-5)
        assert float(denoiser.model.told.flatten()[0]) == pytest.approx(torch.tensor(sigma).log().item() / 4, rel=1e-4)


def test_pooled_features_do_not_know_places():
    """The mean over places: of shuffled places the same, and what `(2, 3)` gives."""
    values = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    shuffled = values.flatten(2)[:, :, torch.randperm(16)].unflatten(2, (4, 4))
    assert torch.allclose(pool(values, "mean"), pool(shuffled, "mean"), atol=1e-6)
    assert torch.equal(pool(values, "mean"), values.mean((2, 3)))
    unit = nn.functional.normalize(pool(values, "mean"))
    assert torch.allclose(unit.norm(dim=1), torch.ones(2))


def test_early_exit_changes_nothing():
    """`out_6` of the run that stops there is that of the whole run, bit for bit."""
    denoiser = Denoiser(network((8, 16, 16, 16), 2, [1]), DDPMScheduler())
    path = ddae_layers(denoiser)[5]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    early = FeatureExtractor(denoiser, path, 10, pooling="mean")(images)[path]
    last = ddae_layers(denoiser)[-1]
    whole = FeatureExtractor(denoiser, [path, last], 10, pooling="mean")(images)[path]
    assert torch.equal(early, whole)


def test_the_null_label_of_dit():
    """1000 is taken in eval mode; in train mode a tenth of the labels become it."""
    embedder = build("dit").transformer.transformer_blocks[0].norm1.emb.class_embedder
    labels = torch.arange(1000).repeat(4)
    torch.manual_seed(0)
    dropped = (embedder.train().token_drop(labels) == 1000).double().mean()
    assert 0.08 < float(dropped) < 0.12
    assert torch.equal(embedder.eval()(torch.tensor([1000])), embedder.embedding_table.weight[1000:])
