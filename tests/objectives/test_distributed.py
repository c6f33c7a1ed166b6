"""Under DDP in one process: it complains of parameters that a step leaves without a gradient, as with several."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from diffusers_repr.objectives import (
    AlignmentLoss,
    AttentionAlignmentLoss,
    DispersiveLoss,
    REPAObjective,
    SelfAlignmentLoss,
)
from tests.objectives.cases import SMALL, attention_teacher, backward, batch, sit
from tests.objectives.test_reg import reg
from tests.objectives.test_repa_e import repa_e


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    assert torch.distributed.get_world_size() == 1
    yield
    torch.distributed.destroy_process_group()


def all_of_it():
    terms = [
        DispersiveLoss(),
        AttentionAlignmentLoss(None, ["blocks.0.attn"], (0,), stop_step=1),
        SelfAlignmentLoss(projector_dim=8),
    ]
    torch.manual_seed(0)
    return REPAObjective(
        sit(), [attention_teacher()], alignment=AlignmentLoss("blocks.1", stop_step=1, **SMALL), losses=terms
    )


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("make", [all_of_it, reg])
def test_every_parameter_gets_a_gradient(make):
    objective = make().train()
    wanted = [backward(objective, batch())[1]]
    for term in objective.losses.values():
        term.step = 1
    wanted.append(backward(objective, batch())[1])
    for term in objective.losses.values():
        term.step = 0
    wrapped = DistributedDataParallel(objective, find_unused_parameters=False)
    for step, grads in enumerate(wanted):
        for term in objective.losses.values():
            term.step = step
        _, got = backward(wrapped, batch())
        assert got.keys() == {f"module.{name}" for name in grads}
        assert all(torch.allclose(got[f"module.{name}"], grad, atol=1e-7) for name, grad in grads.items())


@pytest.mark.usefixtures("group")
def test_phases():
    plain, objective = repa_e().train(), repa_e().train()
    wrapped = DistributedDataParallel(objective, find_unused_parameters=True)
    for _ in range(2):
        for phase in objective.phases:
            losses = []
            for module in (plain, wrapped):
                module.zero_grad()
                torch.manual_seed(4)
                out = module(batch(), phase=phase)
                out["loss"].backward()
                losses.append(out["loss"].item())
            assert losses[0] == pytest.approx(losses[1], abs=1e-6)
            one, other = (
                {n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (plain, objective)
            )
            assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
