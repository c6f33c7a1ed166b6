"""l-DAE: levels by hand, the loss in loops over patches and coordinates, where the noise lies, the product."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffusers_repr.encoders import Encoder
from diffusers_repr.models import PatchPCA
from diffusers_repr.objectives import LDAEConfig, LDAEObjective
from diffusers_repr.objectives.ldae import ldae_level
from tests.objectives.cases import shake

MODEL = {"sample_size": 8, "patch_size": 2, "in_channels": 2, "num_layers": 4, "hidden_size": 16,
         "num_attention_heads": 2, "modulation_size": 4}  # fmt: skip


def images(count=3, seed=0, size=8):
    return torch.rand(count, 2, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def ldae(**changes):
    config = LDAEConfig(**{"model": MODEL, "num_directions": 3, **changes})
    return LDAEObjective(shake(config.build()), config.fit([images(40, seed=5)]), config)


def test_levels():
    time = torch.tensor([0, 10, 333, 999])
    gamma, sigma, weight = ldae_level(time, LDAEConfig())
    assert gamma.tolist() == [1.0] * 4
    assert sigma.tolist() == pytest.approx([math.sqrt(2) * t / 999 for t in (0, 10, 333, 999)], rel=1e-6)
    assert sigma[1].item() == pytest.approx(0.014, abs=2e-4)
    assert weight.tolist() == pytest.approx([1 / (1 + 2 * (t / 999) ** 2) for t in (0, 10, 333, 999)], rel=1e-6)
    assert weight[-1].item() == pytest.approx(1 / 3, rel=1e-6)
    gamma, sigma, weight = ldae_level(time, LDAEConfig(noise_rule="gamma"))
    assert (gamma**2).tolist() == pytest.approx([1 - t / 999 for t in (0, 10, 333, 999)], abs=1e-6)
    torch.testing.assert_close(gamma**2 + sigma**2, torch.ones(4))
    torch.testing.assert_close(weight, gamma**2)
    gamma, sigma, weight = ldae_level(time, LDAEConfig(noise_rule="single", max_sigma=0.5))
    assert (gamma.tolist(), sigma.tolist(), weight.tolist()) == ([1.0] * 4, [0.5] * 4, [1.0] * 4)


@pytest.mark.parametrize("rule", ["linear", "gamma", "single"])
def test_the_loss_by_loops(rule):
    objective, x0, time = ldae(noise_rule=rule), images(), torch.tensor([20, 500, 998])
    noise = torch.randn(3, 16, 3, generator=torch.Generator().manual_seed(1))
    seen = []
    objective.network.register_forward_pre_hook(lambda module, args: seen.append(args))
    out = objective({"pixel_values": x0, "time": time, "noise": noise})
    v, mean = (part.double().numpy() for part in (objective.pca.directions, objective.pca.mean))
    with torch.no_grad():
        predicted = objective.network(*seen[0]).sample
    signal = residual = 0.0
    for b in range(3):
        share = int(time[b]) / 999
        gamma, sigma, weight = {
            "linear": (1.0, math.sqrt(2) * share, 1 / (1 + 2 * share**2)),
            "gamma": (math.sqrt(1 - share), math.sqrt(share), 1 - share),
            "single": (1.0, math.sqrt(2), 1.0),
        }[rule]
        for n, (i, j) in enumerate((i, j) for i in range(0, 8, 2) for j in range(0, 8, 2)):
            x, net, shown = (
                part[b, :, i : i + 2, j : j + 2].double().numpy().ravel() for part in (x0, predicted, seen[0][0])
            )
            corrupted = gamma * v[:3] @ (x - mean) + sigma * noise[b, n].double().numpy()
            np.testing.assert_allclose(shown, v[:3].T @ corrupted + mean, atol=1e-5)
            r = v @ (x - net)
            signal += weight * sum(r[:3] ** 2) / 8 / 16 / 3
            residual += weight * sum(r[3:] ** 2) / 8 / 16 / 3
    assert float(out["signal"]) == pytest.approx(signal, rel=1e-4)
    assert float(out["residual"]) == pytest.approx(residual, rel=1e-4)
    assert float(out["loss"].detach()) == pytest.approx(signal + 0.1 * residual, rel=1e-4)
    assert torch.equal(seen[0][1], time)


def test_with_all_weights_1_it_is_the_error_of_the_pixels():
    objective = ldae(noise_rule="single", residual_weight=1.0)
    with torch.no_grad():
        objective.network.proj_out.weight.zero_()
        objective.network.proj_out.bias.fill_(0.3)
    x0 = images()
    assert float(objective({"pixel_values": x0})["loss"].detach()) == pytest.approx(
        float((x0 - 0.3).square().mean()), rel=1e-5
    )


def test_without_noise_and_with_all_directions_the_network_sees_the_image():
    objective, x0 = ldae(num_directions=8), images()
    objective.network.forward = lambda x, t: type("Output", (), {"sample": x})
    out = objective({"pixel_values": x0, "time": torch.zeros(3, dtype=torch.long)})
    assert float(out["loss"]) < 1e-10
    noisy, same = objective.reconstruct(x0, 0, torch.zeros(3, 16, 8))
    torch.testing.assert_close(noisy, x0, atol=1e-6, rtol=0)
    assert same is noisy


def test_the_noise_lies_in_the_directions_and_is_as_large_as_sigma():
    objective, x0 = ldae(), images(64, size=16)
    patches = objective.pca.patches(x0)
    noise = torch.randn(64, 64, 3, generator=torch.Generator().manual_seed(0))
    one, sigma = torch.ones(64), torch.full((64,), 0.7)
    noisy = objective.corrupt(patches, one, sigma, noise) - objective.corrupt(patches, one, 0 * sigma, noise)
    v = objective.pca.directions[:3]
    assert (noisy - noisy @ v.T @ v).norm(dim=-1).max() < 1e-5
    variances = (noisy @ v.T).flatten(0, 1).var(0)
    assert variances.tolist() == pytest.approx([0.49] * 3, rel=0.05)


def test_the_residual_has_a_tenth_of_the_gradient():
    objective, x0 = ldae(noise_rule="single"), images(1)
    prediction = torch.zeros(1, 2, 8, 8, requires_grad=True)
    objective.network.forward = lambda x, t: type("Output", (), {"sample": prediction})
    objective({"pixel_values": x0})["loss"].backward()
    gradient = objective.pca.project(objective.pca.patches(prediction.grad), centred=False)
    error = objective.pca.project(objective.pca.patches(-x0), centred=False)
    weights = gradient / error * 128 / 2
    torch.testing.assert_close(weights[..., :3], torch.ones_like(weights[..., :3]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weights[..., 3:], torch.full_like(weights[..., 3:], 0.1), rtol=1e-3, atol=1e-3)


def test_the_folder_is_the_encoder(tmp_path):
    objective, x0 = ldae(), images()
    objective.save_pretrained(tmp_path, objective.state_dict(), torch.float32)
    encoder = Encoder.from_pretrained(tmp_path, layer=-1)
    torch.testing.assert_close(encoder.encode_pixels(x0)["global"], objective.encode(x0), atol=1e-5, rtol=1e-4)
    assert Encoder.from_pretrained(tmp_path).num_blocks == 2
    assert torch.equal(PatchPCA.from_pretrained(tmp_path / "pca").directions, objective.pca.directions)
    assert objective.unsaved() == {}
    assert not any(name.startswith("pca") for name in objective.state_dict())


def test_stages_without_pca():
    objective = ldae(basis="pixels", num_directions=2)
    noisy, _ = objective.reconstruct(images(), 0, torch.zeros(3, 16, 2))
    expected = torch.nn.functional.avg_pool2d(images(), 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(noisy, expected, atol=1e-5, rtol=1e-5)


def test_bad_settings():
    for wrong, told in (
        ({"noise_rule": "cosine"}, "linear, gamma, single"),
        ({"basis": "fourier"}, "pca, pixels"),
        ({"max_sigma": 0.0}, "max_sigma"),
        ({"residual_weight": -1.0}, "residual_weight"),
        ({"feature_timestep": 1000.0}, "feature_timestep"),
        ({"model": {**MODEL, "num_classes": 3}}, "leave out num_classes"),
        ({"model": {**MODEL, "patchsize": 3}}, "Unknown key 'patchsize'"),
        ({"encoder_layers": 5}, "1 to 4"),
        ({"num_directions": 9}, "8 directions"),
    ):
        with pytest.raises(ValueError, match=told):
            ldae(**wrong)
    config = LDAEConfig(model=MODEL, num_directions=3)
    with pytest.raises(ValueError, match="The PCA is of patches of 4 and 2 channels, the network of 2 and 2"):
        LDAEObjective(config.build(), PatchPCA(4, 2, 3), config)
    with pytest.raises(ValueError, match="multiples of the patch, 2"):
        ldae().check_batch({"pixel_values": torch.zeros(1, 2, 7, 8)})


@pytest.mark.slow
def test_digits_learn_a_representation():
    """400 steps, three seeds: 5-shot probes, of d = 8 above d = 2, and both above the untrained network."""
    from diffusers_repr.data import DataConfig, load_train_data
    from diffusers_repr.sweep import few_shot_probe

    data, test = (load_train_data(DataConfig("digits", dataset_split=split), 1, 8) for split in ("train", "test"))

    def whole(rows):
        batch = {key: torch.stack([torch.as_tensor(rows[n][key]) for n in range(len(rows))]) for key in rows[0]}
        return rows.on_device(batch)["pixel_values"], batch["class_labels"]

    (x, y), (held, truth) = whole(data), whole(test)

    def score(objective):
        return few_shot_probe(objective.encode(x), y, objective.encode(held), truth, shots=5, draws=10).mean

    found: dict[int, list[float]] = {2: [], 8: []}
    for seed, d in itertools.product(range(3), found):
        torch.manual_seed(seed)
        model = {"sample_size": 8, "patch_size": 4, "in_channels": 1, "num_layers": 4, "hidden_size": 64,
                 "num_attention_heads": 4}  # fmt: skip
        config = LDAEConfig(model=model, num_directions=d)
        objective = LDAEObjective(config.build(), config.fit([x]), config)
        before, optimizer = score(objective), torch.optim.AdamW(objective.parameters(), 1e-3, weight_decay=0)
        for _ in range(400):
            optimizer.zero_grad()
            objective({"pixel_values": x[torch.randint(len(x), (128,))]})["loss"].backward()
            optimizer.step()
        found[d].append(score(objective))
        assert found[d][-1] > before
    assert sum(found[8]) / 3 >= sum(found[2]) / 3 + 0.008
