"""`Run`: what a step does, what is logged, what a checkpoint brings back."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusers_repr.training import make_accelerator
from diffusers_repr.training.logs import Log, read_log
from diffusers_repr.training.run import Run, make_optimizer
from tests.training.loop_cases import (
    Numbers,
    Toy,
    assert_same,
    forget_accelerate,
    read_lines,
    run_here,
    settings,
    tiny_objective,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Line(Toy):
    """w x, with names that are logged in some steps only."""

    def __init__(self):
        super().__init__()
        self.network = nn.Linear(3, 1)
        self.told = {}
        self.steps = []

    def forward(self, batch, phase="main"):
        return {"loss": self.network(batch["x"]).square().mean(), **self.told}

    def on_step_end(self, step, ema):
        self.steps.append((step, None if ema is None else ema.updates))


def run_of(objective, folder="unused", **changes):
    forget_accelerate()
    config = settings(folder, **{"lr_warmup_steps": 0, **changes})
    return Run(objective, config, make_accelerator(config, len(objective.phases) > 1), {"id": 1})


def batch(step=0, scale=1.0):
    return [{"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) * scale}]


def test_means_are_of_the_steps_in_which_a_name_was_there_and_finite():
    objective = Line()
    run = run_of(objective)
    for step, told in enumerate([{"a": 1.0}, {"a": math.nan}, {"a": 3.0, "b": 5.0}, {"b": math.inf}]):
        objective.told = {name: torch.tensor(value) for name, value in told.items()}
        run.step(batch(step), lambda given: given)
    means = run.take_averages()
    assert means["a"] == 2.0
    assert means["b"] == 5.0
    assert set(means) == {"loss", "grad_norm", "a", "b"}
    assert run.take_averages() == {}
    objective.told = {}
    run.step(batch(9), lambda given: given)
    assert set(run.take_averages()) == {"loss", "grad_norm"}


def test_a_window_of_skipped_steps_has_no_mean():
    run = run_of(Line())
    run.step(batch(scale=math.nan), lambda given: given)
    assert run.take_averages() == {}
    assert (run.progress.step, run.progress.skipped, run.progress.skipped_in_a_row) == (1, 1, 1)
    run.step(batch(), lambda given: given)
    run.settle()
    assert (run.progress.step, run.progress.skipped, run.progress.skipped_in_a_row) == (2, 1, 0)


def test_the_logged_mean_is_over_steps_and_micro_batches():
    objective = Line()
    objective.network.requires_grad_(True)
    run = run_of(objective, learning_rate=1e-30, gradient_accumulation_steps=2)
    parts = [batch(n)[0] for n in range(4)]
    with torch.no_grad():
        expected = sum(float(objective.network(part["x"]).square().mean()) for part in parts) / 4
    for at in (0, 2):
        run.step(parts[at : at + 2], lambda given: given)
    assert run.take_averages()["loss"] == pytest.approx(expected)


def test_a_step_has_its_own_random_numbers():
    seen = []

    def prepare(given):
        seen.append(torch.rand(3))
        return given

    for _ in range(2):
        run = run_of(Line(), seed=5)
        torch.manual_seed(len(seen))  # what went before does not matter
        for step in range(3):
            run.step(batch(step), prepare)
    assert torch.equal(torch.stack(seen[:3]), torch.stack(seen[3:]))
    assert not torch.equal(seen[0], seen[1])


def test_the_micro_batches_know_their_number():
    seen = []

    class Counts(Line):
        def forward(self, batch, phase="main"):
            seen.append(batch["micro"])
            return super().forward(batch)

    run_of(Counts()).step([batch(0)[0], batch(1)[0]], lambda given: given)
    assert seen == [0, 1]


class Phases(Toy):
    """Two networks with a loss each; the first loss also reaches the second network."""

    phases = ("first", "second")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, batch, phase="main"):
        if phase == "first":
            return {"loss": self.second(self.first(batch["x"])).square().mean()}
        return {"loss": (self.second(batch["x"]) - 1).square().mean()}

    def param_groups(self, phase="main"):
        return [{"params": getattr(self, phase).parameters()}]


def test_phases_do_not_mix():
    """As two optimizers by hand, each on the gradient of its own loss."""
    objective, plain = Phases(), Phases()
    run = run_of(objective, max_grad_norm=1e9, lr_scheduler="constant", adam_weight_decay=0.0, ema_warmup=False)
    optimizers = {name: torch.optim.AdamW(getattr(plain, name).parameters(), 0.01, weight_decay=0.0)
                  for name in plain.phases}  # fmt: skip
    for step in range(3):
        run.step(batch(step), lambda given: given)
        for name, optimizer in optimizers.items():
            plain.zero_grad()
            plain(batch(step)[0], name)["loss"].backward()
            optimizer.step()
    assert_same(objective.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    means = run.take_averages()
    assert set(means) == {"first_loss", "first_grad_norm", "second_loss", "second_grad_norm"}
    assert run.ema.updates == 3  # once a step, not once a phase


def test_the_log_of_several_phases_has_their_losses_alone(tmp_path):
    run = run_of(Phases(), tmp_path)
    log = Log(run.config, 0, run.accelerator, None)
    run.step(batch(), lambda given: given)
    log.write(run, run.take_averages(), 1.0)
    (line,) = read_log(tmp_path / "loss.jsonl", 1)
    assert [name for name in line if name.endswith("loss")] == ["first_loss", "second_loss"]
    assert log.summary().startswith(f"first_loss={line['first_loss']:.4f}, second_loss={line['second_loss']:.4f}, ")


def test_a_bad_phase_skips_the_moving_average():
    objective = Phases()
    run = run_of(objective, ema_warmup=False)
    run.step(batch(scale=math.inf), lambda given: given)
    assert run.ema.updates == 0
    run.settle()
    assert run.progress.skipped == 1


def test_a_checkpoint_brings_all_back(tmp_path):
    objective = Line()
    run = run_of(objective, tmp_path, ema_warmup=True)
    for step in range(4):
        run.step(batch(step, math.nan if step == 1 else 1.0), lambda given: given)
    path = run.save(streams=[{"at": 3}])
    other = Line()
    fresh = run_of(other, tmp_path, ema_warmup=True)
    assert fresh.load(path)["streams"] == [{"at": 3}]
    assert fresh.progress == run.progress
    assert fresh.progress.skipped == 1
    assert fresh.ema.updates == run.ema.updates == 3
    assert other.steps == [(4, 3)]  # the objective learns where the run stands
    for each in (run, fresh):
        each.step(batch(9), lambda given: given)
    assert_same(objective.state_dict(), other.state_dict())
    assert_same(run.ema.state_dict(), fresh.ema.state_dict())
    assert run.take_averages() == fresh.take_averages()
    assert dict(run._optimizer_state()).keys() == dict(fresh._optimizer_state()).keys()


def test_frozen_parts_are_in_no_checkpoint_and_stay_in_eval_mode(tmp_path):
    objective = Line()
    teacher = objective.freeze("teacher", nn.Sequential(nn.Linear(3, 3), nn.Dropout()))
    objective.partly = nn.Linear(2, 2)
    objective.partly.weight.requires_grad_(False)
    run = run_of(objective, tmp_path)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    path = run.save()
    assert sorted(load_file(path / "model.safetensors")) == ["network.bias", "network.weight", "partly.bias"]


def test_nothing_to_train():
    objective = Line()
    objective.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        make_optimizer(objective.param_groups(), settings("unused"))


def test_cosine_and_warm_up_reach_the_optimizer(tmp_path):
    run_here(tmp_path, tiny_objective(), Numbers(), logging_steps=1)
    rates = [line["learning_rate"] for line in read_lines(tmp_path)]
    assert rates[:3] == [0.005, 0.01, 0.01]
    assert rates[2] > rates[3] > rates[4] > rates[5] > 0
