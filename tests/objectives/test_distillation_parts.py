"""Parts of distillation: levels and the policy's gradient, distances against loops."""

import math

import pytest
import torch
from torch.nn import functional

from diffusers_repr.noise import NoiseSchedule
from diffusers_repr.objectives.distillation import distances
from diffusers_repr.objectives.distillation.levels import (
    PolicyLevel,
    PolicyNetwork,
    UniformLevel,
    mutual_information,
    policy_loss,
    spread_timesteps,
)
from tests.objectives.distillation_cases import Constant


def vp() -> NoiseSchedule:
    return NoiseSchedule("vp", "epsilon", 1000, torch.linspace(-1e-4, -9, 1000, dtype=torch.float64))


# --- levels


def bandit(seed: int, entropy: float) -> tuple[int, float]:
    """The level taken most and the expected reward after 300 steps; rewards -1 to -2."""
    torch.manual_seed(seed)
    rewards = torch.linspace(-1, -2, 10)[torch.randperm(10)]
    policy = PolicyLevel(vp(), Constant(torch.zeros(10)), spread_timesteps(vp(), 10))
    optimizer = torch.optim.SGD(policy.parameters(), 0.5)
    pixels = torch.zeros(32, 1, 1, 1)
    for _ in range(300):
        choice = policy.choose(pixels)
        loss = policy_loss(choice.log_probability, rewards[choice.bins]) - entropy * choice.entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chances = policy.network.logits.softmax(0).detach()
    return int(chances.argmax() == rewards.argmax()), float(chances @ rewards)


@pytest.mark.parametrize(
    ("entropy", "seeds"),
    [(0.1, 1), pytest.param(0.0, 10, marks=pytest.mark.slow), pytest.param(0.1, 10, marks=pytest.mark.slow)],
)
def test_a_policy_finds_the_best_of_ten(entropy, seeds):
    for seed in range(seeds):
        right, reward = bandit(seed, entropy)
        assert right
        assert reward > (-1.15 if entropy else -1.1)  # uniform: -1.5


def test_the_gradient_of_the_policy():
    """Its mean over batches points along the exact gradient of sum_k pi_k R_k; the baseline lowers its variance."""
    torch.manual_seed(0)
    logits, rewards = torch.randn(10, dtype=torch.float64), torch.linspace(-1, -2, 10, dtype=torch.float64)
    chances = logits.softmax(0)
    exact = chances * (rewards - chances @ rewards)
    found = {}
    for baseline in (False, True):
        parameter, gradients = logits.clone().requires_grad_(), []
        for _ in range(500):
            taken = torch.multinomial(chances, 32, replacement=True)
            loss = policy_loss(parameter.log_softmax(0)[taken], rewards[taken], baseline)
            gradients.append(-torch.autograd.grad(loss, parameter)[0])
        found[baseline] = torch.stack(gradients)
        assert float(functional.cosine_similarity(found[baseline].mean(0), exact, dim=0)) > 0.99
    plain, based = (found[key].var(0).sum() for key in (False, True))
    assert float(plain / based) > 5


def test_mutual_information_is_that_of_the_joint_table():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    p /= p.sum(1, keepdim=True)
    wanted = 0.0
    for b in range(6):
        for k in range(4):
            joint = float(p[b, k]) / 6
            wanted += joint * math.log(joint / (float(p[:, k].mean()) / 6))
    assert float(mutual_information(p.log())) == pytest.approx(wanted, rel=1e-9)
    assert float(mutual_information(p[:1].log().expand(6, -1))) == pytest.approx(0, abs=1e-12)


def test_uniform_levels_and_their_falling_bound():
    pixels = torch.zeros(200, 1, 1, 1)
    only = UniformLevel(vp(), 1).choose(pixels).level.timestep
    assert only.tolist() == [0.0] * 200
    every = UniformLevel(vp()).choose(torch.zeros(20_000, 1, 1, 1)).level.timestep
    assert every.min() < 2
    assert every.max() > 997
    assert torch.equal(every, every.floor())
    falling = UniformLevel(vp(), 1000, 50, steps=100)
    for step, bound in ((0, 1000), (25, 762.5), (100, 50), (400, 50)):
        falling.on_step_end(step)
        assert falling.bound == pytest.approx(bound)
        drawn = falling.choose(pixels).level.timestep
        assert drawn.max() < bound
        assert drawn.max() > 0.9 * bound - 2
    flow = UniformLevel(NoiseSchedule("flow", "velocity"), 200.0).choose(pixels).level.timestep
    assert 150 < flow.max() <= 200


def test_a_policy_draws_its_own_levels_and_tells_their_chances():
    torch.manual_seed(0)
    policy = PolicyLevel(vp(), PolicyNetwork(1, 3), [0, 300, 900])
    pixels = torch.randn(3000, 1, 8, 6)
    choice = policy.choose(pixels[:1].expand(3000, -1, -1, -1), torch.Generator().manual_seed(0))
    chances = policy.network(pixels[:1]).softmax(1)[0]
    for at, timestep in enumerate((0, 300, 900)):
        share = float((choice.level.timestep == timestep).float().mean())
        assert share == pytest.approx(float(chances[at]), abs=0.04)
    wanted = vp().resolve(choice.level.timestep.double())
    torch.testing.assert_close(choice.level.alpha, wanted.alpha)
    again = policy.choose(pixels, torch.Generator().manual_seed(1))
    assert torch.equal(again.bins, policy.choose(pixels, torch.Generator().manual_seed(1)).bins)
    given = policy.choose(pixels[:2], time=torch.tensor([900.0, 0.0]))
    assert given.bins.tolist() == [2, 0]
    torch.testing.assert_close(given.log_probability, policy.network(pixels[:2]).log_softmax(1)[[0, 1], [2, 0]])
    with pytest.raises(ValueError, match=r"The timesteps \[301.0\] are none of the policy's levels"):
        policy.choose(pixels[:1], time=torch.tensor([301.0]))


# --- distances


def vectors(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 5, generator=generator)


def smooth(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_relational_distances_against_loops():
    ours, theirs = (part.double().tolist() for part in vectors())

    def apart(rows):
        table = [[math.dist(a, b) for b in rows] for a in rows]
        mean = sum(map(sum, table)) / 12  # of the pairs of two images
        return [[value / mean for value in row] for row in table]

    def angle(rows, i, j, k):
        one = [a - b for a, b in zip(rows[j], rows[i], strict=True)]
        two = [a - b for a, b in zip(rows[k], rows[i], strict=True)]
        product = math.hypot(*one) * math.hypot(*two)
        return sum(a * b for a, b in zip(one, two, strict=True)) / product if product else 0.0

    s, t = apart(ours), apart(theirs)
    wanted = sum(smooth(s[i][j] - t[i][j]) for i in range(4) for j in range(4)) / 16
    assert float(distances.relational_distance(*vectors())) == pytest.approx(wanted, rel=1e-5)
    triples = [(i, j, k) for i in range(4) for j in range(4) for k in range(4)]
    wanted = sum(smooth(angle(ours, *place) - angle(theirs, *place)) for place in triples) / 64
    assert float(distances.relational_angle(*vectors())) == pytest.approx(wanted, rel=1e-5)
    turned = vectors()[0] @ torch.linalg.qr(vectors(1)[0].T @ vectors(1)[0]).Q * 3 + 1  # a motion keeps all relations
    assert float(distances.relational_distance(turned, vectors()[0])) < 1e-9
    assert float(distances.relational_angle(turned, vectors()[0])) < 1e-9
    leaf = vectors()[0].requires_grad_()
    (distances.relational_distance(leaf, leaf.detach()) + distances.relational_angle(leaf, leaf.detach())).backward()
    assert bool(leaf.grad.isfinite().all())


def test_contrastive_and_attention_against_loops():
    ours, theirs = (functional.normalize(part.double(), dim=1) for part in vectors())
    logits = ours @ theirs.T / 0.1
    wanted = sum(float(logits[i].logsumexp(0) - logits[i, i]) for i in range(4)) / 4
    assert float(distances.contrastive(*vectors())) == pytest.approx(wanted, rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 2, 3, 4, 5, generator=generator)
    maps = []
    for part in (one.double(), two.double()):
        strength = part.square().sum(1).flatten(1)
        maps.append(strength / strength.square().sum(1, keepdim=True).sqrt())
    wanted = sum(float((a - b).square().sum().sqrt()) for a, b in zip(*maps, strict=True)) / 2
    assert float(distances.attention_transfer(one, two)) == pytest.approx(wanted, rel=1e-5)
    wanted = float((maps[0] - maps[1]).square().mean())
    assert float(distances.attention_error(one, two)) == pytest.approx(wanted, rel=1e-5)
    assert distances.attention_error(torch.randn(2, 3, 8, 6), two).isfinite()  # of another size: resized
