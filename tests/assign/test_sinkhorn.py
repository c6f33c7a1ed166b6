"""Sinkhorn-Knopp: balanced, whatever the processes; the assigner that learns by it."""

import pytest
import torch
import torch.nn.functional as F

from diffusers_repr.assign import SinkhornAssigner, clustering_loss, sinkhorn_knopp


def scores(rows=256, prototypes=16):
    generator = torch.Generator().manual_seed(0)
    q, p = (F.normalize(torch.randn(n, 64, generator=generator), dim=1) for n in (rows, prototypes))
    return q @ p.T


def slowly(values, epsilon, iterations):
    """The paper's algorithm entry by entry in float64: columns to 1 / K, rows to 1 / B, rows to 1."""
    q = (values.double() / epsilon).exp().tolist()
    rows, columns = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        sums = [sum(row[k] for row in q) for k in range(columns)]
        q = [[x / sums[k] / columns for k, x in enumerate(row)] for row in q]
        q = [[x / sum(row) / rows for x in row] for row in q]
    return torch.tensor(q, dtype=torch.float64) * rows


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 1), (0.05, 3), (0.3, 20)])
def test_is_the_papers_algorithm(epsilon, iterations):
    values = scores(40, 7)
    found = sinkhorn_knopp(values, epsilon, iterations)
    torch.testing.assert_close(found.double(), slowly(values, epsilon, iterations), rtol=1e-4, atol=1e-6)


def test_balance():
    values = scores()
    for iterations, away in ((3, 0.2), (20, 1e-5)):
        found = sinkhorn_knopp(values, iterations=iterations)
        torch.testing.assert_close(found.sum(1), torch.ones(256), rtol=0, atol=1e-6)
        assert ((found.sum(0) / 16 - 1).abs() < away).all()
    assert (sinkhorn_knopp(values).sum(0) / 16 - 1).abs().max() > 1e-3  # three are not yet all


def test_a_prototype_that_all_prefer_is_held_back():
    """What is added to all its scores changes nothing; and samples are each for themselves."""
    values = scores()
    found = sinkhorn_knopp(values)
    more = values.clone()
    more[:, 3] += 5.0  # a hundred times epsilon: far beyond what exp holds beside the others
    torch.testing.assert_close(sinkhorn_knopp(more), found, rtol=1e-3, atol=1e-5)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(sinkhorn_knopp(values[order]), found[order], rtol=1e-4, atol=1e-6)


def sinkhorn_job():
    """What two processes do: uneven parts of one batch; gathered in order."""
    import torch.distributed as dist

    values, rank = scores(), dist.get_rank()
    return sinkhorn_knopp((values[:100], values[100:])[rank]).tolist()


def test_two_processes_are_one(together):
    first, second = together[1]["sinkhorn"]
    torch.testing.assert_close(torch.tensor(first + second), sinkhorn_knopp(scores()), rtol=1e-5, atol=1e-6)


def test_loss_is_the_formula_and_trains_the_scores_alone():
    values = scores(12, 5).requires_grad_()
    found = clustering_loss(values)
    targets = slowly(values.detach(), 0.05, 3)
    logs = (values.double() / 0.1) - (values.double() / 0.1).exp().sum(1, keepdim=True).log()
    torch.testing.assert_close(found.double(), -(targets * logs).sum(1), rtol=1e-4, atol=1e-5)
    found.sum().backward()
    # of a softmax: (softmax - target) / temperature
    torch.testing.assert_close(values.grad.double(), 10 * ((10 * values.double()).softmax(1) - targets).detach(),
                               rtol=1e-3, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("output", ["class", "vector"])
def test_finds_clusters_that_are_there(output):
    generator = torch.Generator().manual_seed(0)
    centres = 6 * F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    true = torch.arange(300) % 3
    features = centres[true] + 0.2 * torch.randn(300, 8, generator=generator)
    assigner = SinkhornAssigner(8, 3, embed_dim=5, norm="layer", output=output).fit(features)
    found = assigner.assign(features)
    if output == "vector":
        torch.testing.assert_close(found.norm(dim=1), torch.ones(300))
        _, found = found.unique(dim=0, return_inverse=True)
    assert found.unique().numel() == 3
    assert all(found[true == k].unique().numel() == 1 for k in range(3))


def test_refuses():
    with pytest.raises(ValueError, match="NaN"):
        sinkhorn_knopp(torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(ValueError, match=r"\(B, K\); got \(3,\)"):
        sinkhorn_knopp(torch.zeros(3))
    with pytest.raises(ValueError, match="epsilon is positive"):
        sinkhorn_knopp(torch.zeros(2, 2), epsilon=0.0)
    with pytest.raises(ValueError, match="5 features cannot fill 6 prototypes"):
        SinkhornAssigner(4, 6).fit(torch.randn(5, 4))
    with pytest.raises(ValueError, match="norm is one of"):
        SinkhornAssigner(4, norm="group")
