"""Contracts of the extension points, as functions: what each asks of a class of yours, checked on a small model."""

from diffusers_repr.testing.guidance import check_guidance
from diffusers_repr.testing.objective import check_auxiliary_loss, check_objective, tiny_denoiser

__all__ = ["check_auxiliary_loss", "check_guidance", "check_objective", "tiny_denoiser"]
