"""The loss of queries, where points do not matter: masks that are the same everywhere, against the formulas."""

import math

import pytest
import torch

from diffusers_repr.data.panoptic import PanopticMap
from diffusers_repr.objectives.odise_loss import QueryLoss, query_targets


def whole(label):
    return PanopticMap(torch.ones(4, 6, dtype=torch.long), {1: label})


def test_against_the_formulas(monkeypatch):
    # Between the centre of a border's pixels and the border transformers reads less than the mask has.
    monkeypatch.setattr(torch, "rand", lambda *shape, **where: torch.full(shape, 0.5))
    heights = [[-1.0, 2.0, 0.5], [0.3, -0.2, 1.0]]
    masks = torch.tensor(heights)[..., None, None].expand(2, 3, 4, 6)
    logits, labels, points = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0)), [1, 0], 32
    found = QueryLoss(2, points)([masks, masks], [logits, logits], [whole(label) for label in labels])
    terms, entropy, weight = {"mask": 0.0, "dice": 0.0}, 0.0, 0.0
    for b, label in enumerate(labels):
        costs = []
        for q in range(3):
            p = 1 / (1 + math.exp(-heights[b][q]))
            mask, dice = -math.log(p), 1 - (2 * p * points + 1) / (p * points + points + 1)
            costs.append((5 * mask + 5 * dice - 2 * float(logits[b, q].softmax(-1)[label]), q, mask, dice))
        _, matched, mask, dice = min(costs)
        terms["mask"] += mask / 2  # two segments in the batch
        terms["dice"] += dice / 2
        for q in range(3):
            own, w = (label, 1.0) if q == matched else (2, 0.1)
            entropy -= w * float(logits[b, q].log_softmax(-1)[own])
            weight += w
    expected = {**terms, "class": entropy / weight}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(2 * value, rel=1e-5)  # two layers
    total = 2 * (2 * expected["class"] + 5 * expected["mask"] + 5 * expected["dice"])
    assert float(found["loss"]) == pytest.approx(total, rel=1e-5)
    lighter = QueryLoss(2, points, {"mask": 0.0, "dice": 0.0})([masks], [logits], [whole(label) for label in labels])
    assert float(lighter["loss"]) == pytest.approx(2 * float(lighter["class"]), rel=1e-5)


def test_a_step_goes_down():
    truth = [PanopticMap(torch.arange(64).view(8, 8) // 32 + 1, {1: 0, 2: 1})]
    torch.manual_seed(0)
    masks, logits = torch.randn(1, 4, 8, 8, requires_grad=True), torch.randn(1, 4, 3, requires_grad=True)
    optimizer, loss, seen = torch.optim.Adam([masks, logits], 0.1), QueryLoss(2, 64), []
    for _ in range(40):
        value = loss([masks], [logits], truth)["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(float(value))
    assert seen[-1] < 0.6 * seen[0]


def test_targets():
    truth = PanopticMap(torch.tensor([[0, 3], [7, 7]]), {3: 1, 7: 0}, frozenset({3}))
    masks, classes = query_targets([truth])
    assert masks[0].tolist() == [[[0, 0], [1, 1]]]
    assert classes[0].tolist() == [0]
    with pytest.raises(ValueError, match="Image 0 .* no segment"):
        query_targets([PanopticMap(torch.zeros(2, 2, dtype=torch.long), {})])
    with pytest.raises(ValueError, match="weights are of class, mask, dice"):
        QueryLoss(2, weights={"box": 1.0})
