import pytest
import torch
from torch import nn

from diffusers_repr.training import EMA
from tests.training.loop_cases import Toy


class Small(Toy):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
        self.network.register_buffer("cache", torch.zeros(2), persistent=False)
        self.head = nn.Linear(4, 2)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)


NAMES = ["head.bias", "head.weight", "network.0.bias", "network.0.weight", "network.1.bias", "network.1.running_mean",
         "network.1.running_var", "network.1.weight"]  # fmt: skip


def move(objective, step):
    """Other weights and buffers, as after a training step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in [*objective.parameters(), *objective.network.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9, True), (0.15, True), (0.0, False), (1.0, False)])
@pytest.mark.parametrize("on_device", [False, True])
def test_the_closed_form(decay, warmup, on_device):
    """Sum over updates of (1 - decay_n) prod of later decays times the weights of update n, in float64."""
    objective = Small()
    ema = EMA(objective, decay, warmup)
    history = [{name: objective.state_dict()[name].double() for name in NAMES}]
    decays = []
    for n in range(12):
        move(objective, n)
        history.append({name: objective.state_dict()[name].double() for name in NAMES})
        decays.append((min(decay, (1 + n) / (10 + n)) if n else 0.0) if warmup else decay)
        ema.step(torch.tensor(True) if on_device else True)
    assert sorted(ema.shadow) == NAMES
    for name in NAMES:
        expected = history[0][name] * torch.tensor(decays).double().prod()
        for n, weights in enumerate(history[1:]):
            expected = expected + (1 - decays[n]) * torch.tensor(decays[n + 1 :]).double().prod() * weights[name]
        torch.testing.assert_close(ema.shadow[name].double(), expected, rtol=1e-5, atol=1e-6)
    if not on_device and decay == 0.0:
        assert all(torch.equal(ema.shadow[name].double(), history[-1][name]) for name in NAMES)
    if decay == 1.0:
        assert all(torch.equal(ema.shadow[name].double(), history[0][name]) for name in NAMES)


def test_a_skipped_step_changes_nothing():
    objective = Small()
    ema = EMA(objective, 0.5, warmup=False)
    before = ema.state_dict()
    move(objective, 0)
    for took_place in (False, torch.tensor(False)):
        ema.step(took_place)
        assert all(torch.equal(tensor, before[name]) for name, tensor in ema.state_dict().items())
    ema.step(True)
    assert not torch.equal(ema.shadow["head.weight"], before["head.weight"])


def test_a_skipped_step_with_infinite_weights_changes_nothing():
    objective = Small()
    ema = EMA(objective, 0.5, warmup=False)
    before = ema.state_dict()
    ema.step(False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ema.state_dict().items())


def test_half_precision_weights_are_averaged_in_float32():
    objective = Small(torch.bfloat16)
    ema = EMA(objective, 0.999, warmup=False)
    assert {tensor.dtype for tensor in ema.shadow.values()} == {torch.float32}
    start = ema.shadow["network.0.weight"].clone()
    with torch.no_grad():
        objective.network[0].weight.fill_(3)
    for _ in range(10):  # each moves the average by less than bfloat16 can tell
        ema.step()
    torch.testing.assert_close(ema.shadow["network.0.weight"], 3 + (start - 3) * 0.999**10)


def test_applied_gives_the_weights_back():
    objective = Small()
    ema = EMA(objective, 0.5, warmup=False)
    average = ema.state_dict()
    move(objective, 3)
    own = {name: objective.state_dict()[name].clone() for name in NAMES}
    with ema.applied():
        assert all(torch.equal(objective.state_dict()[name], average[name]) for name in NAMES)
    assert all(torch.equal(objective.state_dict()[name], own[name]) for name in NAMES)
    with pytest.raises(ZeroDivisionError), ema.applied():
        _ = 1 / 0
    assert all(torch.equal(objective.state_dict()[name], own[name]) for name in NAMES)


def test_state_goes_round():
    objective = Small()
    ema = EMA(objective, 0.5, warmup=False)
    move(objective, 1)
    ema.step()
    other = EMA(Small(), 0.5, warmup=False)
    other.load_state_dict(ema.state_dict())
    assert all(torch.equal(tensor, ema.shadow[name]) for name, tensor in other.shadow.items())
    kept = ema.state_dict()
    ema.step()
    assert not torch.equal(kept["head.weight"], ema.shadow["head.weight"])  # a state is a copy
    with pytest.raises(KeyError):
        other.load_state_dict({})


def test_shared_weights_are_averaged_once():
    objective = Small()
    objective.head.weight = nn.Parameter(torch.randn(2, 4))
    objective.twin = nn.Linear(4, 2)
    objective.twin.weight = objective.head.weight
    assert "twin.weight" not in EMA(objective, 0.5).shadow


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match=rf"lies in \[0, 1\]; got {decay}"):
        EMA(Small(), decay)


def test_nothing_to_average():
    with pytest.raises(ValueError, match="Nothing to average"):
        EMA(Toy(), 0.5)
