import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusers_repr.training.update import Update, total_norm

SETTINGS = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
ALONE = SimpleNamespace(scaler=None, num_processes=1)


def network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def update_of(model, max_grad_norm, waits=True):
    optimizer = torch.optim.AdamW(model.parameters(), 1.0, fused=True, **SETTINGS)
    update = Update(ALONE, optimizer, max_grad_norm)
    assert update.waits  # what it does on a CPU; False is the way of other devices
    update.waits = waits
    return update


def loss_of(model, step, scale=1.0):
    inputs = torch.randn(6, 5, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()))
    return (model(inputs) - 1).square().mean() * scale


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.05, 1e6, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_fused_equals_clip_grad_norm_and_adamw(dtype, tolerance, max_grad_norm, waits):
    """In float64 too the factor of the clip is a float32, as AdamW's kernels take it."""
    tolerance = max(tolerance, 1e-7 if max_grad_norm == 0.05 else 0.0)
    model, plain = network(dtype), network(dtype)
    update = update_of(model, max_grad_norm, waits)
    optimizer = torch.optim.AdamW(plain.parameters(), 1.0, foreach=False, fused=False, **SETTINGS)
    for step in range(6):
        lr = 0.01 * (step + 1)
        loss = loss_of(model, step)
        loss.backward()
        norm, finite = update.step(lr, loss, None)
        loss_of(plain, step).backward()
        expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm or math.inf)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(norm, expected, rtol=tolerance, atol=tolerance)
        assert bool(finite)
        assert all(p.grad is None for p in model.parameters())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_leaves_all_as_it_was(waits, bad):
    model = network(torch.float32)
    update = update_of(model, 1.0, waits)
    loss = loss_of(model, 0)
    loss.backward()
    update.step(0.01, loss, None)
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [{k: v.clone() for k, v in update.inner.state[p].items()} for p in model.parameters()]
    loss = loss_of(model, 1, bad)
    loss.backward()
    _, finite = update.step(0.01, loss, None)
    assert not bool(finite)
    for p, before, kept in zip(model.parameters(), weights, moments, strict=True):
        assert torch.equal(p, before)
        assert all(torch.equal(value, kept[name]) for name, value in update.inner.state[p].items())
        assert p.grad is None
    loss = loss_of(model, 1)
    loss.backward()
    _, finite = update.step(0.01, loss, None)
    assert bool(finite)
    assert int(update.inner.state[p]["step"]) == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_loss_that_is_not_finite_with_a_gradient_that_is():
    model = network(torch.float32)
    update = update_of(model, 1.0)
    loss_of(model, 0).backward()
    before = model[0].weight.detach().clone()
    _, finite = update.step(0.01, torch.tensor(math.nan), None)
    assert not bool(finite)
    assert torch.equal(model[0].weight, before)


def test_each_group_has_its_share_of_the_learning_rate():
    model = network(torch.float64)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr_scale": 0.1}]
    optimizer = torch.optim.AdamW(groups, 1.0, fused=True)
    Update(ALONE, optimizer, 1.0).step(0.5, loss_backward(model), None)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def loss_backward(model):
    loss = loss_of(model, 0)
    loss.backward()
    return loss


def test_parameters_without_a_gradient_stay():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    update = update_of(model, 1.0)
    before = model["unused"].weight.detach().clone()
    loss = model["used"](torch.ones(1, 2)).sum()
    loss.backward()
    update.step(0.1, loss, None)
    assert torch.equal(model["unused"].weight, before)


def test_a_loss_without_any_gradient():
    model = network(torch.float32)
    with pytest.raises(RuntimeError, match="does not depend on what the optimizer trains"):
        update_of(model, 1.0).step(0.1, torch.tensor(0.0), None)


def test_total_norm():
    grads = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    expected = sum(grad.square().sum() for grad in grads).sqrt()
    torch.testing.assert_close(total_norm(grads), expected)
