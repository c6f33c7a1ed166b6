"""SimSiam, BYOL and Barlow Twins: losses against loops in float64, stopped gradients, the target in closed form."""

import math

import numpy as np
import pytest
import torch

from diffusers_repr.data import TrainData
from diffusers_repr.objectives import BYOLObjective, SelfSupervisedConfig, SimSiamObjective
from diffusers_repr.objectives.self_supervised.barlow_twins import barlow_twins_loss
from diffusers_repr.objectives.self_supervised.byol import byol_loss, target_decay
from diffusers_repr.objectives.self_supervised.simsiam import simsiam_loss
from tests.training.loop_cases import forget_accelerate, read_lines, run_here

VIT = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1,
       "num_attention_heads": 2, "intermediate_size": 8}  # fmt: skip


def rows(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 5, 3, generator=torch.Generator().manual_seed(seed))


def cosine(one, two) -> float:
    return float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))


def test_simsiam_and_byol_equal_float64_loops_and_stop_their_gradients():
    p1, p2, z1, z2 = rows().requires_grad_()
    x1, x2, y1, y2 = (part.detach().double().numpy() for part in (p1, p2, z1, z2))
    pairs = [(cosine(x1[i], y2[i]), cosine(x2[i], y1[i])) for i in range(5)]
    loss = simsiam_loss((p1, p2), (z1, z2))
    assert float(loss) == pytest.approx(np.mean([-a / 2 - b / 2 for a, b in pairs]), rel=1e-5)
    other = byol_loss((p1, p2), (z1, z2))
    assert float(other) == pytest.approx(np.mean([2 - 2 * a + 2 - 2 * b for a, b in pairs]), rel=1e-5)
    for value in (loss, other):
        inputs = torch.autograd.grad(value, (p1, p2, z1, z2), allow_unused=True)
        assert [found is None or not bool(found.any()) for found in inputs] == [False, False, True, True]
    assert float(simsiam_loss((p1, p2), (p2, p1))) == pytest.approx(-1)  # each predicts the other's projection exactly
    assert float(simsiam_loss((p1.bfloat16(), p2), (z1, z2))) == pytest.approx(float(loss), abs=1e-2)


def test_barlow_twins_equals_a_float64_loop():
    one, two, *_ = rows(seed=1)
    a, b = ((part - part.mean(0)) / part.std(0) for part in (one.double().numpy(), two.double().numpy()))
    wanted = 0.0
    for i in range(3):
        for j in range(3):
            c = sum(a[row, i] * b[row, j] for row in range(5)) / 5
            wanted += (1 - c) ** 2 if i == j else 0.1 * c**2
    assert float(barlow_twins_loss(one, two, 0.1)) == pytest.approx(wanted, rel=1e-4)
    drawn = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    white = torch.linalg.qr(drawn - drawn.mean(0))[0]  # numbers without correlation: nothing is left to be lost
    assert float(barlow_twins_loss(white, 3 * white + 1, 0.1)) == pytest.approx(0, abs=1e-3)


def test_without_a_stopped_gradient_the_encoder_learns_otherwise():
    """The gradient of SimSiam is that of the predictions alone, the projections held still."""
    torch.manual_seed(0)
    objective = SimSiamObjective(VIT, [0.5], [0.5], projection_dim=4).double()
    views = torch.rand(2, 4, 1, 8, 8, dtype=torch.float64) * 2 - 1
    objective({"views": views})["loss"].backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad()
    parts = objective.parts(objective.encoder, views.flatten(0, 1))
    total = 0.0
    for part in parts:
        z1, z2 = (objective.projector(view) for view in part.chunk(2))
        fixed = [z.detach().clone() for z in (z1, z2)]
        for z, other in ((z1, fixed[1]), (z2, fixed[0])):
            total = total - torch.cosine_similarity(objective.predictor(z), other).mean() / 2
    (total / 2).backward()
    for name, p in objective.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-12, rtol=1e-9)


def byol(**settings) -> BYOLObjective:
    torch.manual_seed(0)
    return BYOLObjective(VIT, [0.5], [0.5], projection_dim=4, **settings)


@pytest.mark.parametrize("method", [SimSiamObjective, BYOLObjective])
def test_the_predictor_alone_has_a_learning_rate_of_its_own(method):
    objective = method(VIT, [0.5], [0.5], projection_dim=4, predictor_lr_scale=3.0)
    rest, own = objective.param_groups()
    assert (rest.get("lr_scale", 1.0), own["lr_scale"]) == (1.0, 3.0)
    named = {id(p): name for name, p in objective.named_parameters() if p.requires_grad}
    found = [[named[id(p)] for p in group["params"]] for group in (rest, own)]
    assert sorted(found[0] + found[1]) == sorted(named.values())
    assert set(found[1]) == {name for name in named.values() if name.startswith("predictor.")}


def test_the_target_is_the_average_of_its_formula():
    objective, base, steps = byol(decay=0.8, steps=4), 0.8, 4
    views = {"views": torch.rand(2, 4, 1, 8, 8) * 2 - 1}
    wanted = {name: p.detach().double().clone() for name, p in objective.encoder.named_parameters()}
    for step in (1, 2, 3):
        objective(views)
        with torch.no_grad():
            for p in objective.parameters():
                p += 0.1 * step
        objective.on_step_end(step, None)
        decay = 1 - (1 - base) * (math.cos(math.pi * step / steps) + 1) / 2
        assert decay == pytest.approx(target_decay(base, step, steps))
        for name, p in objective.encoder.named_parameters():
            wanted[name] = decay * wanted[name] + (1 - decay) * p.detach().double()
    for name, p in objective.target["encoder"].module.named_parameters():
        torch.testing.assert_close(p.double(), wanted[name], atol=1e-6, rtol=1e-5)
    before = {name: value.clone() for name, value in objective.trained_state().items()}
    objective.on_step_end(4, None)  # as after reading a checkpoint: no step was taken
    assert all(torch.equal(value, before[name]) for name, value in objective.trained_state().items())
    assert "target.projector.0.weight" in before
    assert not any(name.startswith("target") for name in objective.state_dict())
    assert not objective.unsaved()


class Views(TrainData):
    """Two views a step, of tensors."""

    class_names = None

    def __init__(self):
        self.images = torch.rand(2, 12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"index": torch.tensor(index)}

    def on_device(self, batch):
        return {**batch, "views": self.images[:, batch["index"]]}

    def fingerprint(self):
        return {"kind": "views"}


LOOP = {"learning_rate": 1e-2, "lr_scheduler": "constant", "lr_warmup_steps": 0, "checkpointing_steps": 2,
        "logging_steps": 1, "train_batch_size": 4, "eval_batch_size": 0}  # fmt: skip


def test_a_stopped_run_goes_on_with_its_target(tmp_path):
    for folder, lengths in (("whole", [4]), ("parts", [2, 4])):
        for steps in lengths:
            run_here(tmp_path / folder, byol(decay=0.5, steps=4), Views(), **LOOP, max_train_steps=steps)
            forget_accelerate()
    whole, parts = ([line["loss"] for line in read_lines(tmp_path / name)] for name in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 4
    saved = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= saved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "simsiam", "temperature": 0.1}, "`temperature` would do nothing: it is of simclr"),
        ({"method": "simclr", "prediction_dim": 4}, "it is of simsiam and byol"),
        ({"method": "byol", "predictor_lr_scale": 0}, "`predictor_lr_scale` must be positive, got 0"),
        ({"method": "barlow_twins", "redundancy_weight": 0.0}, "must be positive"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfSupervisedConfig(VIT, **settings)


def half(rank: int, meet: str, inputs: tuple, results) -> None:
    """The loss of one half of the pairs, and its gradient, in one of two processes."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    one, two = (part[3 * rank : 3 * rank + 3].clone() for part in inputs)
    one.requires_grad_()
    loss = barlow_twins_loss(one, two, 0.1)
    loss.backward()
    results[rank] = (loss.item(), one.grad.tolist())
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_correlate_all_pairs(tmp_path):
    """Each has the loss of the whole batch, and the gradient that DDP would average is that of the whole."""
    one, two = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    whole = one.clone().requires_grad_()
    expected = barlow_twins_loss(whole, two, 0.1)
    expected.backward()
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(half, (str(tmp_path / "meet"), (one, two), results), nprocs=2)
        losses, gradients = zip(*(results[rank] for rank in (0, 1)), strict=True)
    assert losses == pytest.approx([expected.item()] * 2, rel=1e-5)
    torch.testing.assert_close(torch.tensor([*gradients[0], *gradients[1]]) / 2, whole.grad, atol=1e-6, rtol=1e-4)
