"""Which pairs are evaluated and who wins: the paper's schedule against loops, races against simulation in float64."""

import math

import pytest
import torch

from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.tasks import AdaptiveSchedule, Averaging, CalibratedRacing, Racing
from diffusers_repr.tasks.denoising_errors.calibration import best_scale, rank_levels, variance_ratio
from diffusers_repr.tasks.denoising_errors.levels import even_timesteps
from diffusers_repr.tasks.denoising_errors.paired import log_evidence
from diffusers_repr.tasks.denoising_errors.pairs import PairTable
from diffusers_repr.tasks.denoising_errors.presets import PRESETS
from diffusers_repr.tasks.denoising_errors.rules import Units

FLOW = NoiseSchedule("flow", "velocity")
# Of the specification: data set -> prompts, evaluations of an image.
COSTS = {
    "food": (101, 5570),
    "cifar10": (10, 2750),
    "aircraft": (100, 5550),
    "pets": (37, 2050),
    "flowers": (102, 5590),
    "stl10": (10, 3000),
    "imagenet": (1000, 124_500),
    "objectnet": (113, 14_400),
}


class Known:
    """Errors `(image, prompt, level, draw)` that are known; keeps what was asked for."""

    def __init__(self, values, levels):
        self.values, self.levels, self.asked = values, list(levels), []

    def __call__(self, asked):
        places = torch.searchsorted(torch.tensor(self.levels, dtype=torch.float64), asked.timesteps)
        columns = torch.stack([asked.images, asked.prompts, places, asked.draws])
        self.asked.append(columns)
        return self.values[tuple(columns)]

    def counts(self):
        """How often each pair was asked for."""
        return torch.cat(self.asked, 1).unique(dim=1, return_counts=True)[1]


def table(images, prompts, levels, draws=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, prompts, levels, draws, generator=generator, dtype=torch.float64)


def run(rule, values, units=None):
    levels = rule.levels(FLOW)
    known = Known(values, levels)
    units = Units.of(range(values.shape[1])) if units is None else units
    return rule(known, units, len(values), levels), known


def paper(errors, n_samples, to_keep):
    """Its code's loop, for one image: errors[prompt][place in the grid]."""
    grid, left, seen = list(range(n_samples[-1])), list(range(len(errors))), {p: [] for p in range(len(errors))}
    count = 0
    for n, keep in zip(n_samples, to_keep, strict=True):
        new = [place for place in grid[len(grid) // n // 2 :: len(grid) // n][:n] if place not in seen[left[0]]]
        for prompt in left:
            seen[prompt] += new
            count += len(new)
        left = sorted(left, key=lambda prompt: sum(errors[prompt][at] for at in seen[prompt]) / len(seen[prompt]))[
            :keep
        ]
    return left[0], count


@pytest.mark.parametrize("name", PRESETS)
def test_evaluations_are_those_of_the_papers_table(name):
    prompts, cost = COSTS[name]
    assert PRESETS[name][0].evaluations(prompts) == cost


def test_the_papers_schedule_is_its_loop_and_asks_every_pair_once():
    rule = AdaptiveSchedule((3, 5, 20), (4, 2, 1))
    values = table(12, 7, 20)
    found, known = run(rule, values)
    want = [paper(image[..., 0].tolist(), rule.n_samples, rule.to_keep) for image in values]
    assert found.labels.tolist() == [label for label, _ in want]
    assert found.evaluations.tolist() == [count for _, count in want] == [rule.evaluations(7)] * 12
    assert known.counts().tolist() == [1] * int(found.evaluations.sum())
    assert len(found.pair_errors) == int(found.evaluations.sum())


@pytest.mark.parametrize("rule", [AdaptiveSchedule((20,), (1,)), AdaptiveSchedule((4, 20), (7, 1)), Averaging(20)])
def test_without_pruning_it_is_brute_force(rule):
    values = table(12, 7, 20)
    found, _ = run(rule, values)
    assert found.labels.tolist() == values.mean((2, 3)).argmin(1).tolist()
    torch.testing.assert_close(found.errors, values.mean((2, 3)))


def test_classes_are_pruned_or_prompts():
    """A class with one good and one bad prompt: `mean` asks for both, the paper's `best` for the good one alone."""
    errors = torch.tensor([[0.1, 0.9, 0.4, 0.4]]).double()[:, :, None, None].expand(1, 4, 8, 1)
    classes, rule = [0, 0, 1, 1], AdaptiveSchedule((2, 8), (1, 1))
    mean, _ = run(rule, errors, Units.of(classes, "mean"))
    best, _ = run(rule, errors, Units.of(classes, "best"))
    assert (int(mean.labels), int(best.labels)) == (1, 0)
    torch.testing.assert_close(mean.errors, torch.tensor([[0.5, 0.4]]).double())
    torch.testing.assert_close(best.errors, torch.tensor([[0.1, 0.4]]).double())


def test_levels():
    scheduler = NoiseSchedule("vp", "epsilon", 1000, torch.log1p(-torch.linspace(1e-4, 0.02, 1000).double()).cumsum(0))
    assert even_timesteps(scheduler, 250) == [2.0 + 4 * k for k in range(250)]
    assert even_timesteps(scheduler, 50) == [1000 // 50 // 2 + 1000 // 50 * k for k in range(50)]
    assert even_timesteps(scheduler, 300)[-1] == 998.0  # the paper's code stops at 898 there
    edm = NoiseSchedule("edm", "edm", 1000, None, 0.002, 80.0, 0.5)
    ends = [math.exp(4 * time) for time in even_timesteps(edm, 2)]
    assert ends[1] / ends[0] == pytest.approx(math.sqrt(80 / 0.002))
    with pytest.raises(ValueError, match="more than the 1000 timesteps"):
        even_timesteps(scheduler, 1001)


def test_evidence_is_the_mixture_of_likelihood_ratios():
    """By quadrature: normal data with density 1 / s of the deviation, an effect that is normal, against none."""
    x, effect = torch.tensor([0.4, 1.1, 0.9, -0.2], dtype=torch.float64), 0.8
    s = torch.logspace(-3, 3, 1001, base=math.e, dtype=torch.float64)[:, None]
    d = torch.linspace(-8, 8, 801, dtype=torch.float64)[None]
    logs = sum(-0.5 * ((one - d * s) / s) ** 2 - s.log() for one in x)
    over_s = torch.trapezoid(logs.exp(), s.log(), dim=0)  # ds / s
    prior = torch.exp(-0.5 * (d[0] / effect) ** 2) / (effect * math.sqrt(2 * math.pi))
    want = torch.trapezoid(over_s * prior, d[0]) / over_s[400]
    found = log_evidence(x.sum(), x.square().sum(), 4, effect)
    assert float(found) == pytest.approx(float(want.log()), abs=2e-3)


def normal_errors(images, gaps, rounds, seed):
    """Errors of rounds: of each unit its own deviation, and a part that all share."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images, len(gaps), 1, rounds, generator=generator, dtype=torch.float64)
    shared = 5 * torch.randn(images, 1, 1, rounds, generator=generator, dtype=torch.float64)
    width = torch.linspace(0.5, 2, len(gaps), dtype=torch.float64)[:, None, None]
    return 10 + shared + width * noise + torch.tensor(gaps, dtype=torch.float64)[:, None, None]


def eliminated(found, best=0):
    """Images in which the best unit had fewer rounds than the winner."""
    counts = torch.zeros(len(found.labels), found.errors.shape[1])
    counts.index_put_((found.asked.images, found.asked.prompts), torch.ones(len(found.pair_errors)), accumulate=True)
    return (found.labels != best) & (counts[:, best] <= counts.amax(1)) & found.decided


def test_a_race_errs_no_more_often_than_it_says(monkeypatch):
    """At the worst case, rivals that are as good, and among better and worse ones; deviations unknown and unequal."""
    rule = Racing(error=0.1, max_rounds=25, effect=1.0)
    for gaps in ([0.0] * 5, [0.0, 0.02, 0.1, 0.5, 3.0]):
        found, _ = run(rule, normal_errors(400, gaps, 25, seed=3))
        assert float(eliminated(found).double().mean()) <= rule.error
    clear, _ = run(rule, normal_errors(200, [0.0, 4.0, 4.0, 5.0, 6.0], 25, seed=4))
    assert bool(clear.decided.all())
    assert float((clear.labels == 0).double().mean()) >= 0.98
    assert float(clear.evaluations.double().mean()) < 5 * 12
    assert float(clear.confidence.amin()) >= 1 - rule.error
    undecided, _ = run(Racing(error=0.1, max_rounds=3, effect=1.0), normal_errors(20, [0.0] * 5, 3, seed=5))
    assert not bool(undecided.decided.any())
    # A test that forgets how often it looks would be caught here.
    monkeypatch.setattr(Racing, "bound", lambda self, units: math.log(1 / 0.9))
    careless, _ = run(rule, normal_errors(400, [0.0] * 5, 25, seed=3))
    assert float(eliminated(careless).double().mean()) > rule.error


def likelihoods(images, classes, levels, distance, seed):
    """Errors that are minus log-likelihoods, of normal data of class 0 and classes so far from each other."""
    generator = torch.Generator().manual_seed(seed)
    centres = distance / math.sqrt(2) * torch.eye(classes, dtype=torch.float64)
    seen = centres[0] + torch.randn(images, 1, levels, classes, generator=generator, dtype=torch.float64)
    return 0.5 * (seen - centres[:, None]).square().sum(-1, keepdim=True)


def test_a_calibrated_race_errs_no_more_often_than_it_says():
    levels, error = 50, 0.1
    values = likelihoods(1000, 4, levels, 0.7, seed=0)
    rule = CalibratedRacing(tuple(even_timesteps(FLOW, levels)), (1.0,) * levels, error)
    found, _ = run(rule, values)
    wrong = float((found.labels != 0).double().mean())
    assert 0.005 < wrong <= error
    assert float(found.decided.double().mean()) > 0.95
    assert float(found.evaluations.double().mean()) < 4 * levels / 2
    bold, _ = run(CalibratedRacing(rule.at, (5.0,) * levels, error), values)  # takes errors for more than they are
    assert float((bold.labels != 0).double().mean()) > error


def test_the_scale_is_that_of_the_likelihood():
    errors = torch.cat([likelihoods(4000, 4, 1, 1.5, seed) for seed in (0, 1)])[:, :, 0, 0] / 7
    assert best_scale(errors, torch.zeros(len(errors), dtype=torch.long))[0] == pytest.approx(7, rel=0.13)


def test_levels_are_ranked_by_what_they_tell():
    """Level 1 tells all classes apart; level 2 one of them with great certainty, the others not at all."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    errors = 0.2 * torch.randn(3, 2, 60, 3, generator=generator, dtype=torch.float64)
    errors[1] -= 1.0 * torch.nn.functional.one_hot(labels, 3)
    far = (labels[:, None] == 2) != (torch.arange(3) == 2)
    errors[2] += 9.0 * far
    found = rank_levels(errors, labels, [10.0, 20.0, 30.0])
    assert found.timesteps == (20.0, 30.0, 10.0)
    assert rank_levels(errors, labels, [10.0, 20.0, 30.0], "variance_ratio").timesteps[0] == 30.0
    assert found.effect > 3
    pairs = torch.tensor([0, 0, 0, 1, 1, 1])
    values = torch.tensor([1.0, 2.0, 3.0, -1.0, 0.0, 1.0], dtype=torch.float64)
    assert variance_ratio(values, pairs) == pytest.approx((4 - 1 / 3 - 1 / 3) / 2)
    with pytest.raises(ValueError, match="are of one class"):
        rank_levels(errors, torch.zeros(60, dtype=torch.long), [10.0, 20.0, 30.0])
    with pytest.raises(ValueError, match="two draws"):
        rank_levels(errors[:, :1], labels, [10.0, 20.0, 30.0])


def test_a_table_asks_nothing_twice():
    rule, values = Racing(at=(3.0,), error=0.1, max_rounds=6), normal_errors(4, [0.0, 1.0, 2.0], 6, seed=0)
    known = Known(values, [3.0])
    held = PairTable(known, 4, 3)
    units = Units.of(range(3))
    first = rule(held, units, 4, [3.0])
    assert held.evaluations == len(known.counts()) == int(known.counts().sum())
    alone = PairTable(None, 4, 3, held.held)
    again = rule(alone, units, 4, [3.0])
    assert torch.equal(first.pair_errors, again.pair_errors)
    with pytest.raises(KeyError, match="not in the table"):
        Racing(at=(3.0,), error=1e-6, max_rounds=6)(alone, units, 4, [3.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdaptiveSchedule((50, 500), (5, 2)), "last of to_keep must be 1"),
        (lambda: AdaptiveSchedule((50, 20), (5, 1)), "n_samples must grow"),
        (lambda: AdaptiveSchedule((50,), (5, 1)), "one number a stage"),
        (lambda: Racing(error=0.0), "error is a probability"),
        (lambda: Racing(effect=-1.0), "effect must be"),
        (lambda: Racing(n_levels=3, at=(1.0,)), "names 1 timesteps"),
        (lambda: CalibratedRacing((1.0, 2.0), (1.0,)), "one number a level"),
        (lambda: CalibratedRacing((1.0,), (1.0,), 2.0), "error is a probability"),
        (lambda: Averaging(0), "n_levels must be"),
        (lambda: Units.of([0, 1], "sum"), "ensemble='sum'"),
    ],
)
def test_rules_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()
