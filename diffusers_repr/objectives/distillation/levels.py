"""At which noise level a teacher is read: one for all images, a random one, or what a policy makes of each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from diffusers_repr.noise import NoiseLevel, NoiseSchedule


@dataclass(frozen=True)
class LevelChoice:
    """Levels of a batch.

    Attributes:
        level: One an image, or one for all, resolved.
        bins: Index of each image's level among a policy's, `(B,)`; None without a policy.
        log_probabilities: Of all the policy's levels, `(B, K)`, with their graph; None without a policy.
    """

    level: NoiseLevel
    bins: Tensor | None = None
    log_probabilities: Tensor | None = None

    @property
    def log_probability(self) -> Tensor:
        """Of each image's own level, `(B,)`."""
        assert self.bins is not None
        assert self.log_probabilities is not None
        return self.log_probabilities.gather(1, self.bins[:, None])[:, 0]

    @property
    def entropy(self) -> Tensor:
        """Of each image's distribution of levels in nats, `(B,)`."""
        assert self.log_probabilities is not None
        return -(self.log_probabilities.exp() * self.log_probabilities).sum(1)


class LevelSelector(nn.Module):
    """Base of what chooses levels. Subclass and write `choose`.

    Args:
        schedule: The teacher's noise process.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def choose(
        self, pixels: Tensor, generator: torch.Generator | None = None, time: Tensor | None = None
    ) -> LevelChoice:
        """Levels for images.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1].
            generator: Of the drawing.
            time: Timesteps `(B,)` instead of drawn ones.
        """
        raise NotImplementedError

    def on_step_end(self, step: int) -> None:
        """Called after every optimizer step; `step` counts from 1."""

    def forward(self, pixels: Tensor) -> LevelChoice:
        """As `choose`."""
        return self.choose(pixels)


class FixedLevel(LevelSelector):
    """One timestep for all images.

    Args:
        schedule: The teacher's noise process.
        timestep: In its units.

    Raises:
        ValueError: For a timestep that the process does not have.
    """

    def __init__(self, schedule: NoiseSchedule, timestep: float) -> None:
        super().__init__(schedule)
        self.level = schedule.resolve(timestep)

    def choose(
        self, pixels: Tensor, generator: torch.Generator | None = None, time: Tensor | None = None
    ) -> LevelChoice:
        """See `LevelSelector`."""
        if time is not None:
            return LevelChoice(self.schedule.resolve(time).to(pixels.device))
        return LevelChoice(self.level)


class UniformLevel(LevelSelector):
    """Timesteps drawn uniformly below a bound, which may fall (RepFusion's `FixT` and `TimeDecay`).

    Args:
        schedule: The teacher's noise process.
        bound: Whole timesteps 0 to bound - 1 are drawn of `vp`; of other processes all from the lowest to it. None:
            the whole range.
        final_bound: What the bound has come to, on a line, after `steps` optimizer steps; None: it stays.
        steps: See `final_bound`.

    Raises:
        ValueError: For a bound that leaves no timestep or lies beyond the process.
    """

    def __init__(
        self, schedule: NoiseSchedule, bound: float | None = None, final_bound: float | None = None, steps: int = 0
    ) -> None:
        super().__init__(schedule)
        low, high = schedule.timestep_range
        high = high + 1 if schedule.kind == "vp" else high
        least = 1.0 if schedule.kind == "vp" else low
        self.first = high if bound is None else float(bound)
        self.last = self.first if final_bound is None else float(final_bound)
        for name, value in (("max_timestep", self.first), ("final_max_timestep", self.last)):
            if not least <= value <= high:
                raise ValueError(f"`{name}` lies from {least:g} to {high:g} in this noise process; got {value:g}.")
        if final_bound is not None and steps < 1:
            raise ValueError(f"The bound falls over 1 or more steps; got {steps}.")
        self.steps, self.step = steps, 0

    @property
    def bound(self) -> float:
        """Of the coming step."""
        share = min(self.step / self.steps, 1.0) if self.steps else 0.0
        return self.first + share * (self.last - self.first)

    def choose(
        self, pixels: Tensor, generator: torch.Generator | None = None, time: Tensor | None = None
    ) -> LevelChoice:
        """See `LevelSelector`."""
        if time is None:
            low = self.schedule.timestep_range[0]
            draws = torch.rand(len(pixels), generator=generator, device=_of(generator)).double().cpu()
            time = low + draws * (self.bound - low)
            time = time.floor() if self.schedule.kind == "vp" else time
        return LevelChoice(self.schedule.resolve(time).to(pixels.device))

    def on_step_end(self, step: int) -> None:
        """See `LevelSelector`."""
        self.step = step


class PolicyLevel(LevelSelector):
    """A small network gives each image probabilities of K levels, of which one is drawn (RepFusion, arXiv 2308.10916).

    Args:
        schedule: The teacher's noise process.
        network: `(B, C, H, W)` in [-1, 1] to logits `(B, K)`.
        timesteps: K timesteps, rising.

    Raises:
        ValueError: For fewer than two timesteps, such as do not rise, or lie outside of the process.
    """

    timesteps: Tensor

    def __init__(self, schedule: NoiseSchedule, network: nn.Module, timesteps: Sequence[float]) -> None:
        super().__init__(schedule)
        if len(timesteps) < 2 or any(b <= a for a, b in zip(timesteps, timesteps[1:], strict=False)):
            raise ValueError(f"A policy chooses among two or more timesteps, which rise; got {list(timesteps)}.")
        self.network = network
        self.level = schedule.resolve(torch.tensor(list(timesteps), dtype=torch.float64))
        self.register_buffer("timesteps", torch.tensor(list(timesteps), dtype=torch.float32), persistent=False)

    def choose(
        self, pixels: Tensor, generator: torch.Generator | None = None, time: Tensor | None = None
    ) -> LevelChoice:
        """See `LevelSelector`.

        Raises:
            ValueError: For a given timestep that is none of the policy's.
        """
        log_probabilities = self.network(pixels.float()).float().log_softmax(1)
        if time is None:
            chances = log_probabilities.detach().exp().to(_of(generator, pixels.device))
            bins = torch.multinomial(chances, 1, generator=generator)[:, 0].to(pixels.device)
        else:
            bins = self.bins_of(time).to(pixels.device)
        return LevelChoice(_rows(self.level.to(pixels.device), bins), bins, log_probabilities)

    def bins_of(self, time: Tensor) -> Tensor:
        """Index of each timestep among the policy's.

        Raises:
            ValueError: If one is none of them.
        """
        found = torch.as_tensor(time, dtype=torch.float32).cpu()[:, None] == self.timesteps.cpu()
        if not bool(found.any(1).all()):
            other = torch.as_tensor(time).cpu()[~found.any(1)].tolist()
            raise ValueError(
                f"The timesteps {other[:5]} are none of the policy's levels, {self.timesteps.tolist()}. Take one of "
                "these, or name others by `policy_timesteps`."
            )
        return found.int().argmax(1)


class PolicyNetwork(nn.Module):
    """Two convolutions of 5 x 5 with pooling and three linear layers, as RepFusion's code; for images of any size.

    The code's convolutions have no padding and fit one size of images; here they keep it, and what they give is
    averaged to 5 x 5 places.

    Args:
        channels: Of the images.
        levels: Logits that leave.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(5), nn.Flatten(),
        )  # fmt: skip
        self.layers = nn.Sequential(
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, levels)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """`(B, C, H, W)` to logits `(B, levels)`."""
        return self.layers(self.convolutions(pixels))


def spread_timesteps(schedule: NoiseSchedule, count: int) -> list[float]:
    """`count` timesteps in equal steps through a process, the first of `vp` and the middle of each part of others.

    Example:
        >>> spread_timesteps(NoiseSchedule("flow", "velocity"), 4)
        [125.0, 375.0, 625.0, 875.0]
    """
    low, high = schedule.timestep_range
    if schedule.kind == "vp":
        return [float(math.floor(at * schedule.num_train_timesteps / count)) for at in range(count)]
    return [low + (at + 0.5) * (high - low) / count for at in range(count)]


def policy_loss(log_probability: Tensor, reward: Tensor, baseline: bool = True) -> Tensor:
    """REINFORCE: `-mean_b log pi(t_b | x_b) (R_b - mean R)`, whose gradient estimates minus that of the mean reward.

    Args:
        log_probability: Of the level each image got, `(B,)`.
        reward: `(B,)`, without a graph.
        baseline: Whether the batch's mean is taken off the reward: the variance falls, the direction stays.
    """
    advantage = reward - reward.mean() if baseline else reward
    return -(log_probability * advantage).mean()


def mutual_information(log_probabilities: Tensor) -> Tensor:
    """I(image; level) in nats, of the images of a batch: `H(mean_b pi_b) - mean_b H(pi_b)`.

    0 where the policy gives every image the same distribution; at most `log(min(B, K))`.

    Args:
        log_probabilities: `(B, K)`.

    Example:
        >>> mutual_information(torch.tensor([[1.0, 0.0], [0.0, 1.0]]).clamp(min=1e-20).log()).round(decimals=4)
        tensor(0.6931, dtype=torch.float64)
    """
    p = log_probabilities.double().exp()
    mean = p.mean(0)
    return (torch.special.entr(mean).sum() - torch.special.entr(p).sum(1).mean()).clamp(min=0)


def _rows(level: NoiseLevel, rows: Tensor) -> NoiseLevel:
    """A level an image, out of a table of levels; nothing is read back from the device."""
    held = {f.name: getattr(level, f.name) for f in fields(level)}
    return replace(level, **{k: v[rows] for k, v in held.items() if isinstance(v, Tensor) and v.ndim})


def _of(generator: torch.Generator | None, device: torch.device | None = None) -> torch.device | None:
    return device if generator is None else generator.device


__all__ = [
    "FixedLevel",
    "LevelChoice",
    "LevelSelector",
    "PolicyLevel",
    "PolicyNetwork",
    "UniformLevel",
    "mutual_information",
    "policy_loss",
    "spread_timesteps",
]
