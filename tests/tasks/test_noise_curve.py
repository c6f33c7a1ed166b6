"""The noise-conditional classifier: its formula, the levels it learns from, and a signal that noise drowns."""

import json
import math

import pytest
import torch
from diffusers import EDMEulerScheduler

from diffusers_repr import Denoiser
from diffusers_repr.features.presets import edm_sigma
from diffusers_repr.heads import PROTOCOLS
from diffusers_repr.tasks import noise_curve
from diffusers_repr.tasks.noise_curve import NoiseConditionalMLP, _Grid
from tests.sweep.selection_models import Rows, planted, striped
from tests.testers.models import build

FAST = PROTOCOLS["ddae"].replace(learning_rate=0.02, epochs=12, batch_size=32)


def test_the_formula():
    """`W2 silu(W1 (f + e)) + b`, hidden width 2 D; e of sines, then cosines, of D / 8 frequencies each."""
    torch.manual_seed(0)
    net = NoiseConditionalMLP(32, 3).double()
    f, t = torch.randn(4, 32, dtype=torch.float64), torch.tensor([1.0, 7.0, 451.0, 1000.0])
    frequencies = torch.exp(-math.log(10_000) / 3 * torch.arange(4.0))
    angles = t[:, None] * frequencies
    wave = torch.cat([angles.sin(), angles.cos()], 1)
    assert torch.allclose(net.time(t), wave, atol=1e-5)
    first, second, into, out = net.embed[0], net.embed[2], net.classify[0], net.classify[2]
    assert into.weight.shape == (64, 32)

    def silu(x):
        return x * torch.sigmoid(x)

    e = silu(wave.double() @ first.weight.T + first.bias) @ second.weight.T + second.bias
    wanted = silu((f + e) @ into.weight.T + into.bias) @ out.weight.T + out.bias
    net.time.forward = lambda t: wave.double()
    assert torch.allclose(net(f, t), wanted)
    with pytest.raises(ValueError, match="multiple of 8"):
        NoiseConditionalMLP(20, 3)


def test_levels():
    """DDPM: whole timesteps, told from 1, the test's as the source's 1, 51, ...; EDM: the 18 of its grid by index."""
    grid = _Grid(Denoiser.from_pipe(build("ddpm")), None)
    assert grid.times == list(range(0, 1000, 50))
    assert grid.codes == list(range(1, 1001, 50))
    times, codes = grid.draw(5000, torch.Generator().manual_seed(0))
    assert torch.equal(codes, times.float() + 1)
    assert (times == times.round()).all()
    assert (float(times.min()), float(times.max())) == pytest.approx((0, 999), abs=3)
    assert float(times.mean()) == pytest.approx(499.5, abs=15)
    denoiser = Denoiser(build("ddim").unet, EDMEulerScheduler())
    edm = _Grid(denoiser, None)
    assert [float(denoiser.level(t).nsr) for t in edm.times] == pytest.approx([edm_sigma(i) for i in range(1, 19)])
    times, codes = edm.draw(400, torch.Generator().manual_seed(0))
    assert set(codes.tolist()) == set(range(1, 19))
    assert all(edm.times[int(c) - 1] == t for t, c in zip(times.tolist(), codes.tolist(), strict=True))
    with pytest.raises(ValueError, match="grid of 18"):
        _Grid(denoiser, [3])


def test_noise_drowns_the_signal(tmp_path):
    denoiser = planted(layer=Rows((0, 2)))
    train, test = striped(96, 0), striped(64, 1)
    seen = []
    handle = denoiser.model.layer.register_forward_pre_hook(lambda m, args: seen.append(args[1].clone()))
    settings = {"pooling": "adaptive:2", "draws": 3, "protocol": FAST, "timesteps": [5, 300, 950]}
    found = noise_curve(denoiser, "layer", train, test, **settings)
    handle.remove()
    assert found.accuracies[0] > 0.8
    assert found.accuracies[2] < 0.5
    assert found.accuracies[0] > found.accuracies[1] > found.accuracies[2]
    assert found.best[0] == 5
    trained = torch.cat(seen[:6])  # two batches a reading: every image at a level of its own
    assert len(trained.unique()) > 200
    assert [set(times.tolist()) for times in seen[6:9]] == [{5}, {300}, {950}]
    again = noise_curve(denoiser, "layer", train, test, batch_size=17, **settings)
    assert again == found  # whatever the batches
    found.save(tmp_path)
    assert json.loads((tmp_path / "noise_curve.json").read_text())["accuracies"] == list(found.accuracies)
    assert (tmp_path / "noise_curve.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="without standardisation"):
        noise_curve(denoiser, "layer", train, test, protocol=PROTOCOLS["adam"])
    with pytest.raises(ValueError, match="two classes"):
        noise_curve(denoiser, "layer", *((images, torch.zeros(len(images)).long()) for images, _ in (train, test)))
