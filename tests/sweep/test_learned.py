"""The learnable selector: its fit against gradient descent, planted truth, the slow loop, and what is refused."""

import pytest
import torch

from diffusers_repr.sweep import Selection, select_features
from diffusers_repr.sweep.learned import mixing_shares
from tests.sweep.selection_models import Rows, planted, striped
from tests.sweep.test_select import NOTHING, slow_ridge

BASE = {"progress": False, "seeds": (0,), "max_layers": 1, "max_levels": 1, "method": "learned"}


@pytest.fixture(scope="module")
def data():
    return striped(64, 0), striped(48, 1)


def test_the_fit_is_the_minimum_that_gradients_find():
    """Of `mean |y - sum sqrt(w_c) P_c z_c|^2 + penalty |P|^2`: descent on w, the head eliminated, ends there."""
    torch.manual_seed(0)
    sizes, count, penalty = (3, 5, 2, 4), 200, 0.05
    groups = list(torch.arange(sum(sizes)).split(sizes))
    z = torch.randn(count, sum(sizes), dtype=torch.float64)
    z[:, groups[1]] += z[:, :1]  # a group that shows part of what another does
    z = (z - z.mean(0)) / z.std(0, correction=0)
    y = z[:, :2] + 0.7 * z[:, 8:10] + 0.3 * torch.randn(count, 2, dtype=torch.float64)
    y = y - y.mean(0)
    scaled = torch.cat([z[:, group] / len(group) ** 0.5 for group in groups], dim=1)

    def loss(weights: torch.Tensor) -> torch.Tensor:
        x = scaled * torch.cat([w.sqrt().expand(n) for w, n in zip(weights, sizes, strict=True)])
        head = torch.linalg.solve(x.T @ x / count + penalty * torch.eye(x.shape[1]), x.T @ y / count)
        return (y - x @ head).square().sum(1).mean() + penalty * head.square().sum()

    found = mixing_shares(z.T @ z / count, z.T @ y / count, groups, penalty)
    assert float(found.sum()) == pytest.approx(1)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(logits.softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    assert float(loss(found)) == pytest.approx(float(loss(logits.softmax(0))), rel=1e-3)
    torch.testing.assert_close(found, logits.softmax(0).detach(), rtol=0.1, atol=0.02)
    assert found[0] > 0.2
    assert found[3] < 0.05


def test_what_complements_keeps_a_weight_and_noise_does_not(data):
    layers = {"noise": Rows(NOTHING), "bit0": Rows((0, 4)), "bit1": Rows((2,)), "more": Rows(NOTHING)}
    found = select_features(planted(**layers), *data, [10, 20], **{**BASE, "max_layers": 2})
    chosen = found.sets["learned"]
    assert (set(chosen.layers), chosen.score, len(chosen.timesteps)) == ({"bit0", "bit1"}, 1.0, 1)
    weights = found.recipe["learned"]["layers"]
    assert min(weights["bit0"], weights["bit1"]) > 0.3
    assert max(weights["noise"], weights["more"]) < 0.1
    assert sum(weights.values()) == pytest.approx(1)
    assert sum(share for _, share in found.recipe["learned"]["timesteps"]) == pytest.approx(1)
    assert "learned" not in select_features(planted(**layers), *data, [10], **{**BASE, "method": "greedy"}).sets


def test_a_planted_level_is_found(data):
    model = planted(early=Rows(NOTHING), late=Rows(NOTHING, (0, 2), 20))
    found = select_features(model, *data, [5, 10, 20], **BASE)
    assert (found.sets["learned"].layers, found.sets["learned"].timesteps) == (("late",), (20,))


def test_the_set_is_what_an_extractor_reads_and_is_saved(data, tmp_path):
    (images, labels), (held, held_labels) = data
    layers = {"noise": Rows(NOTHING), "bit0": Rows((0, 4)), "bit1": Rows((2,), (0,), 20)}
    model = planted(**layers)
    found = select_features(model, *data, [10, 20], penalties=(1e-2,), **{**BASE, "max_layers": 2, "max_levels": 2})
    read = found.extractor(model, "learned")
    joined = []
    for x in (images, held):
        out = read(x)
        parts = [out[layer] if out[layer].ndim == 3 else out[layer][None] for layer in out.layers]
        joined.append(torch.cat([level for part in parts for level in part], dim=1))
    chosen = found.sets["learned"]
    assert joined[0].shape[1] == chosen.dim
    # constant features have no scale; they are left out here as they are there
    alive = joined[0].double().std(0) > 1e-6
    score = slow_ridge(joined[0][:, alive], labels, joined[1][:, alive], held_labels, (1e-2,))[0]
    assert score == pytest.approx(chosen.score)
    found.save(tmp_path, heatmap=False)
    again = Selection.load(tmp_path)
    assert again.sets["learned"] == chosen
    assert again.recipe["learned"] == found.recipe["learned"]


def test_refused(data):
    model = planted(bit0=Rows((0,)))
    with pytest.raises(ValueError, match="method='best'; expected one of greedy, learned"):
        select_features(model, *data, [10], **{**BASE, "method": "best"})
