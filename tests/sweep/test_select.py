"""What selection finds, against planted truth and against the slow loop."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel

from diffusers_repr import Denoiser, FeatureExtractor, list_layers
from diffusers_repr.sweep import select_features
from tests.sweep.selection_models import Rows, planted, striped

LEVELS = [5, 10, 20]
BASE = {"progress": False, "seeds": (0,), "max_layers": 1, "max_levels": 1}
NOTHING = (4, 5, 6, 7)  # rows without the label


@pytest.fixture(scope="module")
def data():
    return striped(64, 0), striped(48, 1)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    return Denoiser(model, DDPMScheduler())


def slow_ridge(train, labels, held, held_labels, penalties):
    """Best `(accuracy, penalty)` by the normal equations, one penalty at a time."""
    train, held = train.double().numpy(), held.double().numpy()
    mean, scale = train.mean(0), train.std(0)
    z, targets = (train - mean) / scale, np.eye(int(labels.max()) + 1)[labels]
    best = (-1.0, 0.0)
    for penalty in penalties:
        gram = z.T @ z / len(z) + penalty * np.eye(z.shape[1])
        weight = np.linalg.solve(gram, z.T @ (targets - targets.mean(0)) / len(z))
        predicted = ((held - mean) / scale @ weight + targets.mean(0)).argmax(1)
        best = max(best, ((predicted == held_labels.numpy()).mean(), penalty))
    return best


def test_equals_the_loop_over_cells(unet, data):
    (images, labels), (held, held_labels) = data
    penalties = (1e-3, 1e-2, 1e-1, 1.0)
    layers = [layer.path for layer in list_layers(unet)][::3]
    found = select_features(unet, *data, LEVELS, layers, batch_size=24, penalties=penalties, **BASE)
    assert len(found.cells) == len(LEVELS) * len(layers)
    expected = {}
    for cell in found.cells:
        read = FeatureExtractor(unet, cell.layer, cell.timestep, pooling="mean", batch_size=24)
        slow = slow_ridge(read(images)[cell.layer], labels, read(held)[cell.layer], held_labels, penalties)
        assert (cell.score, cell.penalty) == pytest.approx(slow)
        assert cell.dim == read(images[:2])[cell.layer].shape[1]
        expected[cell] = slow[0]
    top = [cell for cell, score in expected.items() if score == max(expected.values())]
    cheapest = min(top, key=lambda c: (c.flops_share, c.dim, c.nsr))
    assert (found.best.layer, found.best.timestep) == (cheapest.layer, cheapest.timestep)


@pytest.mark.parametrize("where", [("early", 10), ("late", 20)])
@pytest.mark.parametrize("criterion", ["ridge", "lda"])
def test_planted_signal_is_found(data, where, criterion):
    layers = {
        name: Rows(NOTHING, (0, 2) if name == where[0] else (), where[1]) for name in ("early", "middle", "late")
    }
    found = select_features(planted(**layers), *data, LEVELS, criterion=criterion, **BASE)
    assert (found.best.layer, found.best.timestep) == where
    assert found.best.score > 0.95
    assert all(cell.score < 0.6 for cell in found.cells if (cell.layer, cell.timestep) != where)


def test_of_redundant_layers_the_cheaper_is_best(data):
    model = planted(noise=Rows(NOTHING), first=Rows((0, 2, 4)), second=Rows((0, 2, 4)))
    found = select_features(model, *data, [20, 10], **BASE)
    assert found.best.layer == "first"
    assert found.best.timestep == 10  # of equal levels the less noisy
    assert {c.score for c in found.cells if c.layer != "noise"} == {1.0}


def test_greedy_adds_what_complements_and_skips_what_repeats(data):
    layers = {"noise": Rows(NOTHING), "bit0": Rows((0, 4)), "again": Rows((0, 4)), "bit1": Rows((2,))}
    found = select_features(planted(**layers), *data, [10], **{**BASE, "max_layers": 3})
    assert [cell.score for cell in found.cells] == pytest.approx([0.25, 0.5, 0.5, 0.5], abs=0.15)
    assert set(found.sets["layers"].layers) == {"bit0", "bit1"}
    assert found.sets["layers"].score == 1.0
    assert found.sets["layers"].dim == 16
    assert len(found.sets["layers"].steps) == 2


def test_greedy_over_levels_joins_what_complements(data):
    model = planted(noise=Rows(NOTHING), layer=_Both(), after=Rows(NOTHING))
    found = select_features(model, *data, LEVELS, **{**BASE, "max_levels": 3})
    assert found.sets["levels"].layers == ("layer",)
    assert found.sets["levels"].timesteps == (5, 10)
    assert found.sets["levels"].score == 1.0


class _Both(Rows):
    """Shows one bit at timestep 5, the other at 10."""

    def forward(self, x, t):
        out = super().forward(x, t)
        for timestep, row in ((5, 0), (10, 2)):
            out[:, row, 0] = torch.where((t == timestep)[:, None], x[:, 0, row], 0.0)
        return out


def test_sets_equal_an_extractor_and_the_loop(unet, data):
    (images, labels), (held, held_labels) = data
    settings = {**BASE, "max_layers": 2, "max_levels": 2, "tolerance": 0.0, "penalties": (1e-2,)}
    found = select_features(unet, *data, LEVELS, batch_size=24, **settings)
    for use in ("best", "layers", "levels"):
        read = found.extractor(unet, use)
        joined = []
        for x in (images, held):
            out = read(x)
            parts = [out[layer] if out[layer].ndim == 3 else out[layer][None] for layer in out.layers]
            joined.append(torch.cat([level for part in parts for level in part], dim=1))
        score = slow_ridge(joined[0], labels, joined[1], held_labels, (1e-2,))[0]
        assert score == pytest.approx(found.best.score if use == "best" else found.sets[use].score)


def test_one_forward_an_image_batch_and_level(data):
    model = planted(**{f"layer{i}": Rows(NOTHING) for i in range(6)})
    found = select_features(model, *data, LEVELS, batch_size=16, **BASE)
    assert model.model.forwards == found.recipe["forwards"] == len(LEVELS) * (64 // 16 + 48 // 16)


def test_batch_size_changes_nothing(unet, data):
    scores = []
    for batch_size in (7, 64):
        found = select_features(unet, *data, [10], batch_size=batch_size, **BASE)
        scores.append([cell.score for cell in found.cells])
    assert scores[0] == scores[1]


def test_order_of_rows_changes_nothing(unet, data):
    (images, labels), held = data
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(3))
    first = select_features(unet, (images, labels), held, [10], **BASE)
    second = select_features(unet, (images[order], labels[order]), held, [10], **BASE)
    assert [c.score for c in first.cells] == [c.score for c in second.cells]


def test_levels_then_layers_take_turns_when_sums_do_not_fit(unet, data):
    whole = select_features(unet, *data, LEVELS, **BASE)
    sizes = [8 * c.dim * (c.dim + 5) / 2**30 for c in whole.cells]
    one_level = sum(sizes) / len(LEVELS)
    for memory_gib, passes in ((1.5 * one_level, len(LEVELS)), (0.6 * one_level, 2 * len(LEVELS))):
        parts = select_features(unet, *data, LEVELS, memory_gib=memory_gib, **BASE)
        assert [c.score for c in parts.cells] == [c.score for c in whole.cells]
        assert parts.recipe["forwards"] == passes * 2  # one batch of each split
    with pytest.raises(ValueError, match="memory_gib"):
        select_features(unet, *data, LEVELS, memory_gib=0.9 * max(sizes), **BASE)


def test_noise_policy_is_a_third_axis(unet, data):
    found = select_features(unet, *data, [10, 600], noise=("per_image", "clean"), **BASE)
    assert {c.noise for c in found.cells} == {"per_image", "clean"}
    noised, clean = ([c.score for c in found.cells if c.noise == n] for n in ("per_image", "clean"))
    assert len(noised) == len(clean)
    assert noised != clean


@pytest.mark.parametrize("noise", ["per_image", "fresh"])
def test_noise_itself_tells_nothing(noise):
    model = planted(rows=Rows(range(8)))
    images, labels = striped(32, 0)
    settings = {**BASE, "pooling": "adaptive:2", "penalties": (1e-6,)}  # 32 features fit 32 rows by heart
    found = select_features(model, (images, labels), striped(32, 1), [999], noise=noise, **settings)
    assert found.best.score < 0.6


def test_spread_over_noise_seeds(unet, data):
    settings = {**BASE, "seeds": (0, 1), "finalists": 2}
    found = select_features(unet, *data, [100, 300], **settings)
    for cell in found.finalists:
        alone = [
            next(
                c.score
                for c in select_features(unet, *data, [cell.timestep], [cell.layer], **{**BASE, "seeds": (s,)}).cells
            )
            for s in (0, 1)
        ]
        assert cell.seed_scores == pytest.approx(alone)
        assert cell.mean == pytest.approx(np.mean(alone))
        assert cell.std == pytest.approx(np.std(alone, ddof=1))
    assert found.best.mean == max(cell.mean for cell in found.finalists)
    assert found.best in found.cells
    assert sum(cell.mean is not None for cell in found.cells) == 2


def test_clean_input_has_no_spread(unet, data):
    found = select_features(unet, *data, [10], noise="clean", **{**BASE, "seeds": (0, 1)})
    assert found.best.std == 0.0
    assert found.best.mean == found.best.score


def test_balanced_accuracy_weighs_classes_alike():
    images, labels = striped(80, 0, classes=2, rows=(0,))
    held, held_labels = striped(60, 1, classes=2, rows=(0,))
    keep = [i for i in range(60) if not held_labels[i] or i < 6]  # 30 of one class, 3 of the other
    skewed = (held[keep], held_labels[keep])
    model = planted(noise=Rows(NOTHING))
    plain = select_features(model, (images, labels), skewed, [10], **BASE)
    balanced = select_features(model, (images, labels), skewed, [10], metric="balanced_accuracy", **BASE)
    read = FeatureExtractor(model, "noise", 10, pooling="mean")
    assert plain.best.score != balanced.best.score
    assert read(held).features["noise"].shape == (60, 8)


def test_numbers_as_targets():
    images, _ = striped(80, 0)
    held, _ = striped(60, 1)
    model = planted(noise=Rows(NOTHING), signal=Rows((0, 4)))
    train, validation = (images, images[:, 0, 0].mean(1).double()), (held, held[:, 0, 0].mean(1).double())
    found = select_features(model, train, validation, [10], metric="r2", noise="clean", **BASE)
    assert found.best.layer == "signal"
    assert found.best.score > 0.999
    errors = select_features(model, train, validation, [10], metric="neg_mse", noise="clean", **BASE)
    noise = {
        name: next(c.score for c in f.cells if c.layer == "noise") for name, f in (("r2", found), ("mse", errors))
    }
    variance = validation[1].var(correction=0).item()
    assert noise["r2"] == pytest.approx(1 + noise["mse"] / variance)


def test_layers_by_name(unet, data):
    found = select_features(unet, *data, [10], ["up_blocks.0.resnets.1.conv1", "conv_in"], **BASE)
    assert [c.layer for c in found.cells] == ["conv_in", "up_blocks.0.resnets.1.conv1"]  # in execution order
    with pytest.raises(ValueError, match="'time_embedding' returns no image"):
        select_features(unet, *data, [10], ["time_embedding"], **BASE)


def test_what_was_passed_in_stays_as_it_was(unet, data):
    unet.model.train()
    state = torch.get_rng_state()
    select_features(unet, *data, [10], **BASE)
    assert unet.model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.model.modules())
    unet.model.eval()
