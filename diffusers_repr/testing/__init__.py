"""Contracts of the extension points, as functions: what each asks of a class of yours, checked on a small model."""

from diffusers_repr.testing.encoder import check_encoder
from diffusers_repr.testing.head import check_head
from diffusers_repr.testing.task import check_task

__all__ = ["check_encoder", "check_head", "check_task"]
