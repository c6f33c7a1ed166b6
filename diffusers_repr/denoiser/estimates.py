"""Whether a network's scheduler is the one it was trained with: told by what it makes of noise that is known."""

from __future__ import annotations

import torch

from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.hub.compiled import plain_module
from diffusers_repr.noise import NoiseLevel

# An estimate of 0 is wrong by 1, one of the opposite noise by 4. A network that is asked for the noise and was trained
# to give EDM's output returns about the opposite at little noise.
MOST = 2.5
_NSR, _ROWS = 0.3, 4


def estimates_can_tell(denoiser: Denoiser) -> bool:
    """Whether errors of the noise tell of the scheduler: not where clean data are estimated, nor of flows."""
    return denoiser.schedule.kind in ("vp", "edm") and denoiser.schedule.output != "sample"


def check_estimates(denoiser: Denoiser, error: float, timestep: float) -> None:
    """Refuse a network whose estimates of the noise are far worse than none.

    Args:
        denoiser: The base.
        error: Mean squared error of its estimates, of noise of variance 1.
        timestep: Where that was found.

    Raises:
        ValueError: With what may be wrong.
    """
    if error > MOST and estimates_can_tell(denoiser):
        schedule, model = denoiser.schedule, type(plain_module(denoiser.model)).__name__
        told = (
            "a network of EDM without its preconditioning" if schedule.kind == "vp" else "a network that is not EDM's"
        )
        raise ValueError(
            f"{denoiser.name or model}: its estimates of the noise at timestep {timestep:g} are wrong by {error:.2f} "
            f"in the mean square, where no estimate at all is wrong by 1. It was not trained for this scheduler "
            f"({schedule.kind}, output {schedule.output!r}): {told}, or another prediction_type. Load it with the "
            "scheduler it was trained with (EDM: EDMEulerScheduler with its sigma_data), or pass Denoiser(model, "
            "schedule=NoiseSchedule(...))."
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
    check_estimates(denoiser, float((eps.float() - noise.float()).square().mean()), float(level.timestep))


__all__ = ["check_estimates", "check_scheduler", "estimates_can_tell"]
