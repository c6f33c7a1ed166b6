"""Noise levels and the forward process: pure functions, one direction (a larger `nsr` is noisier).

Notation (Karras et al. 2022, arXiv 2206.00364; Lipman et al. 2022, arXiv 2210.02747; the survey arXiv 2407.00783):
`x_t = alpha x_0 + sigma eps` is always the tensor that the network takes; for EDM it is `c_in (x_0 + sigma_edm eps)`.
Derivatives (`alpha_dot`, `sigma_dot`) are per unit of a time that runs from 0 (data) to 1 (noise).
"""

from diffusers_repr.noise.conversions import (
    Prediction,
    add_noise,
    eps_shift_to_output,
    expand,
    output_difference,
    to_x0_eps,
)
from diffusers_repr.noise.level import LevelLike, NoiseLevel
from diffusers_repr.noise.sampler import SamplerLevel, sampler_level
from diffusers_repr.noise.schedule import OUTPUTS, NoiseSchedule, Output
from diffusers_repr.noise.targets import training_target

__all__ = [
    "OUTPUTS",
    "LevelLike",
    "NoiseLevel",
    "NoiseSchedule",
    "Output",
    "Prediction",
    "SamplerLevel",
    "add_noise",
    "eps_shift_to_output",
    "expand",
    "output_difference",
    "sampler_level",
    "to_x0_eps",
    "training_target",
]
