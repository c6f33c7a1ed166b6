"""Contracts of the extension points, as functions: what each asks of a class of yours, checked on a small model."""

from diffusers_repr.testing.guidance import check_guidance

__all__ = ["check_guidance"]
