"""Training methods: each an `Objective`, one module with everything it trains, that `train` runs."""

from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.diffusion import DiffusionObjective, NoisyBatch
from diffusers_repr.objectives.times import TimeSampler

__all__ = ["Batch", "DiffusionObjective", "NoisyBatch", "Objective", "TimeSampler", "weighted_sum"]
