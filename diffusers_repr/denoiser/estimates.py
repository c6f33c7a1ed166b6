"""Whether a network's scheduler is the one it was trained with: told by what it makes of noise that is known."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.noise import NoiseLevel

# The cosine of an estimate of the noise with the noise. Near 1 of a trained network where there is much noise, above 0
# of images that it was not trained for, about 0 of one with random weights. A network that was trained to give EDM's
# output returns about the opposite of the noise, where there is not much of it.
LEAST = -0.2
_NSR, _ROWS = 0.3, 4


def estimates_can_tell(denoiser: Denoiser) -> bool:
    """Whether estimates of the noise tell of the scheduler: not where clean data are estimated, nor of flows."""
    return denoiser.schedule.kind in ("vp", "edm") and denoiser.schedule.output != "sample"


def noise_cosine(eps: Tensor, noise: Tensor) -> Tensor:
    """How far an estimate of the noise points its way, `(B,)`, float32.

    Args:
        eps: The estimate `(B, ...)`.
        noise: The noise.
    """
    return torch.cosine_similarity(eps.flatten(1).float(), noise.flatten(1).float())


def check_estimates(denoiser: Denoiser, cosine: float, timestep: float) -> None:
    """Refuse a network whose estimates of the noise point away from it.

    Args:
        denoiser: The base.
        cosine: Mean of `noise_cosine`.
        timestep: Where that was found.

    Raises:
        ValueError: With what may be wrong.
    """
    if cosine < LEAST and estimates_can_tell(denoiser):
        schedule, model = denoiser.schedule, type(plain_module(denoiser.model)).__name__
        told = (
            "a network of EDM without its preconditioning" if schedule.kind == "vp" else "a network that is not EDM's"
        )
        raise ValueError(
            f"{denoiser.name or model}: its estimates of the noise at timestep {timestep:g} point away from the noise "
            f"(cosine {cosine:.2f}). It was not trained for this scheduler ({schedule.kind}, output "
            f"{schedule.output!r}): {told}, or another prediction_type. Load it with the scheduler of its training "
            "(EDM: EDMEulerScheduler with its sigma_data), or pass Denoiser(model, schedule=NoiseSchedule(...))."
        )


def check_scheduler(denoiser: Denoiser) -> None:
    """As `check_estimates`, of a grey image with a little noise, under any condition, where the size is configured.

    Raises:
        ValueError: See there.
    """
    if not estimates_can_tell(denoiser) or denoiser.config.get("sample_size") is None:
        return  # of another size than its own a network may be wrong for other reasons
    shape = (_ROWS, denoiser.family.channels(), *denoiser.latent_size(denoiser.image_size))
    condition = denoiser.family.example(_ROWS, str(denoiser.device))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(denoiser.device, denoiser.dtype)
    level = denoiser.level(NoiseLevel(nsr=_NSR))
    with torch.no_grad(), denoiser.evaluating():
        x_t = denoiser.add_noise(torch.zeros_like(noise), level, noise)
        eps = denoiser.predict(x_t, level, condition).eps
    check_estimates(denoiser, float(noise_cosine(eps, noise).mean()), float(level.timestep))


__all__ = ["check_estimates", "check_scheduler", "estimates_can_tell", "noise_cosine"]
