"""The one evaluation of representations: each number is that of its probe; baselines are what they say."""

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LassoCV
from torch import nn

from diffusers_repr import Denoiser, Encoder
from diffusers_repr.sweep import (
    FinetuneProtocol,
    ProbeSettings,
    dci_score,
    few_shot_probe,
    finetune_probe,
    knn_probe,
    linear_probe,
    measure_representation,
)
from diffusers_repr.sweep.representation import attribute_scores, binary_attributes
from tests.encoders.vits import build


def images(count, seed=0):
    """Three classes of 8 x 8: where the bright square is, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    found = torch.rand(count, 1, 8, 8, generator=generator) * 0.6
    for row, label in enumerate(labels.tolist()):
        found[row, :, 2 * label : 2 * label + 3, 2 * label : 2 * label + 3] += 0.3
    return found.clamp(0, 1), labels


def textures(count, seed=0):
    """Three classes that a mean over places tells: stripes, stripes across, neither, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    found = torch.rand(count, 1, 8, 8, generator=generator) * 0.5
    found[labels == 0, :, ::2] += 0.3
    found[labels == 1, :, :, ::2] += 0.3
    found[labels == 2] += 0.15
    return found, labels


def denoiser(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DModel(
            8, 1, 1, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        )  # fmt: skip
    return Denoiser(unet, DDPMScheduler())


class Small(nn.Module):
    """A network without a config: a convolution, and a method that is read."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 2, stride=2), nn.BatchNorm2d(6), nn.Tanh())

    def forward_features(self, pixels):
        return self.body(pixels)


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Small()
    return Encoder.from_module(net, patch_size=2, channels=1, forward=net.forward_features, name="small")


def layer(seed=0):
    return Encoder.from_denoiser(denoiser(seed), "mid_block", 50)


def test_scores_are_those_of_the_probes_and_stand_beside_the_baselines():
    train, test, encoder = images(60), images(30, 1), layer()
    settings = ProbeSettings(shots=2, draws=3, k=5, protocol="ridge", seed=4)
    found = measure_representation(encoder, train, test, beside=["pixels", "random", small()], settings=settings)
    assert list(found.rows) == ["mid_block@50", "raw pixels", "random network", "small"]
    assert list(found.dims.values()) == [16, 64, 16, 6]
    fresh = encoder.untrained(4)
    for name, make in (
        ("mid_block@50", encoder), ("random network", fresh), ("small", small()), ("raw pixels", None),
    ):  # fmt: skip
        bank, queries = (
            2 * x.flatten(1) - 1 if make is None else make(x).global_features for x in (train[0], test[0])
        )
        pair = (bank, train[1], queries, test[1])
        few = few_shot_probe(*pair, 2, draws=3, protocol="ridge", seed=4)
        assert found.rows[name] == {
            "linear": linear_probe(*pair, protocol="ridge", seed=4).accuracy,
            "few_shot": few.mean, "few_shot_std": few.std, "knn": knn_probe(*pair, k=5).accuracy,
        }  # fmt: skip
    flat = found.flat()
    assert flat["linear"] == found.rows["mid_block@50"]["linear"]
    assert flat["knn: raw pixels"] == found.rows["raw pixels"]["knn"]
    with pytest.raises(ValueError, match="Unknown baseline 'pixel'"):
        measure_representation(encoder, train, test, beside=["pixel"])
    with pytest.raises(ValueError, match="is named twice"):
        measure_representation(encoder, train, test, beside=[layer(1)])
    with pytest.raises(ValueError, match="unknown probe 'lineer'"):
        ProbeSettings(("lineer",))


@pytest.mark.parametrize(
    "make", [layer, small, lambda: Encoder.from_module(build("dinov2"), patch_size=2, prefix_tokens=1)]
)
def test_an_untrained_encoder_has_other_weights_of_its_own_seed(make):
    encoder = make()
    state = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    before = torch.get_rng_state()
    one, two, again = encoder.untrained(1), encoder.untrained(2), encoder.untrained(1)
    assert torch.equal(torch.get_rng_state(), before)
    pixels = torch.rand(2, encoder.channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    own, first, second, third = (x.encode_pixels(pixels).tokens for x in (encoder, one, two, again))
    assert torch.equal(first, third)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, own)
    assert all(torch.equal(value, encoder.module.state_dict()[name]) for name, value in state.items())
    assert one.module.state_dict().keys() == state.keys()
    same = encoder.copy()
    assert torch.equal(same.encode_pixels(pixels).tokens, own)
    assert same.module is not encoder.module


def test_untrained_of_a_saved_network_of_transformers(tmp_path):
    build("vit").save_pretrained(tmp_path)
    encoder = Encoder.from_pretrained(tmp_path, mean=0.5, std=0.5)
    fresh = encoder.untrained(0)
    assert fresh.module.state_dict().keys() == encoder.module.state_dict().keys()  # no pooler came along
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    assert not torch.allclose(fresh.encode_pixels(pixels).tokens, encoder.encode_pixels(pixels).tokens)

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, pixels):
            return pixels * self.weight

    with pytest.raises(TypeError, match="neither a config nor reset_parameters"):
        Encoder.from_module(Own(), patch_size=1, channels=1).untrained(0)
    net = nn.Conv2d(1, 2, 2, stride=2)
    by_function = Encoder.from_module(net, patch_size=2, channels=1, forward=lambda x: net(x))
    with pytest.raises(TypeError, match="no method of Conv2d"):
        by_function.untrained(0)


@pytest.mark.parametrize("make", [layer, small])
def test_features_with_a_gradient_are_the_features(make):
    encoder = make()
    pixels = 2 * images(4)[0] - 1
    encoder.module.requires_grad_(True).eval()
    output = encoder.encode_with_gradient(pixels)
    assert torch.allclose(output.tokens.detach(), encoder.encode_pixels(pixels).tokens, atol=1e-6)
    output.global_features.square().sum().backward()
    reached = [p for p in encoder.module.parameters() if p.grad is not None and float(p.grad.abs().sum()) > 0]
    assert reached


@pytest.mark.parametrize(("make", "data", "gain"), [(layer, images, 0.1), (small, textures, 0)])
def test_finetuning_learns_and_leaves_the_encoder_alone(make, data, gain):
    encoder, train, test = make(), data(60), data(30, 1)
    state = {name: value.clone() for name, value in encoder.module.state_dict().items()}
    protocol = FinetuneProtocol(epochs=6, batch_size=16, learning_rate=1e-2)
    found = finetune_probe(encoder, train, test, protocol=protocol, seed=0)
    assert all(torch.equal(value, encoder.module.state_dict()[name]) for name, value in state.items())
    assert not any(p.requires_grad and p.grad is not None for p in encoder.module.parameters())
    frozen = finetune_probe(
        encoder, train, test, protocol=FinetuneProtocol(6, 16, 1e-2, network_lr_scale=1e-9), seed=0
    )
    assert found.accuracy >= max(frozen.accuracy + gain, 0.6)
    assert found.accuracy == finetune_probe(encoder, train, test, protocol=protocol, seed=0).accuracy
    assert found.protocol["epochs"] == 6
    with pytest.raises(ValueError, match="have class 2, the training images 2 classes"):
        finetune_probe(encoder, (train[0], train[1] % 2), test, protocol=protocol)


def test_the_rate_rises_and_falls_by_half_a_cosine():
    protocol = FinetuneProtocol(warmup=0.25)
    assert [round(protocol.rate(at, 8), 4) for at in range(8)] == [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    with pytest.raises(ValueError, match="share of the steps"):
        FinetuneProtocol(warmup=1.0)


def test_dci_finds_planted_numbers():
    """Each attribute is a number of the code, or two of them; forests and the lasso see it."""
    codes = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    other = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))

    def told(z):
        return {"a": 3 * z[:, 0] + 1, "b": -z[:, 1], "c": (z[:, 2] > 0).long()}

    for predictor, low in (("lasso", 0.93), ("forest", 0.8)):
        found = dci_score(codes, told(codes), other, told(other), predictor=predictor)
        assert found.importance.argmax(0).tolist() == [0, 1, 2]
        assert min(found.disentanglement, found.completeness, found.informativeness) > low, predictor
        assert torch.allclose(found.importance.sum(0), torch.ones(3).double())
    mixed = torch.tensor([[1.0, 1, 0, 0], [1, -1, 0, 0], [0, 0, 1, 1], [0, 0, 1, -1]]) / 2**0.5
    turned = dci_score(codes @ mixed, told(codes), other @ mixed, told(other), predictor="lasso")
    assert turned.disentanglement < 0.6  # the same is told, by other numbers
    assert turned.informativeness > 0.9
    x = (codes.double() - codes.double().mean(0)) / codes.double().std(0, correction=0)
    y = told(codes)["a"].double()
    y = (y - y.mean()) / y.std(correction=0)
    forest = RandomForestRegressor(100, random_state=0).fit(x.numpy(), y.numpy())
    lasso = LassoCV(random_state=0).fit(x.numpy(), y.numpy())
    wanted = torch.tensor(forest.feature_importances_)
    found = dci_score(codes, told(codes), other, told(other), predictor="forest")
    assert torch.allclose(found.importance[:, 0], wanted / wanted.sum())
    weights = torch.tensor(lasso.coef_).abs()
    found = dci_score(codes, told(codes), other, told(other), predictor="lasso")
    assert torch.allclose(found.importance[:, 0], weights / weights.sum())
    mean, std = codes.double().mean(0), codes.double().std(0, correction=0)
    said = torch.tensor(lasso.predict(((other.double() - mean) / std).numpy()))
    truth = (told(other)["a"].double() - told(codes)["a"].double().mean()) / told(codes)["a"].double().std(
        correction=0
    )
    r2 = 1 - float(((said - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert found.each["a"] == pytest.approx(r2)


def test_what_dci_refuses():
    codes, two = torch.randn(6, 3), {"a": torch.randn(6), "b": torch.tensor([0, 1, 2, 0, 1, 2])}
    with pytest.raises(ValueError, match="3 classes. Take"):
        dci_score(codes, two, codes, two, predictor="lasso")
    with pytest.raises(ValueError, match="two attributes"):
        dci_score(codes, {"a": two["a"]}, codes, {"a": two["a"]})
    with pytest.raises(ValueError, match="name the same"):
        dci_score(codes, two, codes, dict(reversed(two.items())))
    with pytest.raises(ValueError, match="the same in all rows"):
        dci_score(codes, {**two, "b": torch.zeros(6)}, codes, {**two, "b": torch.zeros(6)})
    with pytest.raises(ValueError, match="Unknown predictor 'trees'"):
        dci_score(codes, two, codes, two, predictor="trees")


def test_attributes_of_a_representation():
    train = {"class": torch.tensor([0, 1, 2, 1]), "size": torch.tensor([1.0, 2.0, 3.0, 9.0])}
    test = {"class": torch.tensor([2, 0]), "size": torch.tensor([2.5, 0.0])}
    found = {name: values.tolist() for name, values in binary_attributes(train, test).items()}
    assert found == {"class 0": [0, 1], "class 1": [0, 0], "class 2": [1, 0], "size": [1, 0]}
    codes = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    both = {"a": codes[:, 0], "b": codes[:, 1]}
    scores = attribute_scores(codes, codes, both, both, "lasso")
    assert scores["captured"] == 2
    assert scores["tad"] > 0.5
    assert scores["disentanglement"] > 0.9
