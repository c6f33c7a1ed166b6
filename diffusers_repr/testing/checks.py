"""What testers share: the failure, equality of tensors, an untouched random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.hooks import count_hooks


def expect(condition: bool, message: str) -> None:
    """Raise AssertionError with a message unless a condition holds."""
    if not condition:
        raise AssertionError(message)


def expect_close(found: Tensor, expected: Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Raise AssertionError unless two tensors agree, shapes included.

    Args:
        found: What came.
        expected: What is right.
        what: What they are, for the message.
        tolerance: Relative and absolute.
    """
    expect(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}.")
    apart = ~torch.isclose(found.float(), expected.float(), rtol=tolerance, atol=tolerance)
    if bool(apart.any()):
        most = float((found.float() - expected.float()).abs()[apart].max())
        raise AssertionError(f"{what}: {int(apart.sum())} values are apart, by up to {most:.3g}.")


@contextmanager
def leaving_alone(what: str, *modules: nn.Module) -> Iterator[None]:
    """Torch's random state, the modules' modes and their hooks must be after the block what they were before."""

    def state() -> list[object]:
        parts = [part for module in modules for part in module.modules()]
        return [
            [part.training for part in parts],
            [count_hooks(part) for part in parts],
        ]

    draws, before = torch.get_rng_state(), state()
    yield
    expect(torch.equal(torch.get_rng_state(), draws), f"{what} draws from torch's global random state.")
    expect(state() == before, f"{what} leaves another mode or hooks on the network.")


__all__ = ["expect", "expect_close", "leaving_alone"]
