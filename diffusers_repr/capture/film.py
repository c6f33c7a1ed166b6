"""`Modulated`: a U-Net whose residual blocks a code scales and shifts, by hooks that are there during its forward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.denoiser.hooks import AfterHook, Hooks
from diffusers_repr.models.film import ScalesAndShifts, film_modules


class Modulated:
    """Rewrites what the residual blocks of a network normalise, in the forwards of `applied`; see `FiLM`.

    Args:
        network: A U-Net.
        blocks: Paths of its residual blocks.
    """

    def __init__(self, network: nn.Module, blocks: Collection[str]) -> None:
        self.network, self.blocks = network, tuple(blocks)
        self._kept: ExitStack | None = None

    @contextmanager
    def applied(self, values: ScalesAndShifts) -> Iterator[None]:
        """Inside, every forward of this thread is modulated.

        With gradient checkpointing the hooks stay until the next call or `close`: the backward pass, maybe in another
        thread, runs the blocks again.

        Args:
            values: Of `FiLM`: block -> (scale, shift), of as many rows as the forward's batch.

        Raises:
            RuntimeError: For a compiled network.
        """
        refuse_compiled(self.network, "Take the plain module, and train without torch_compile.")
        self.close()
        again = torch.is_grad_enabled() and bool(getattr(self.network, "is_gradient_checkpointing", False))
        with ExitStack() as stack:
            hooks = Hooks(stack, (lambda: True) if again else None)
            for path, (module, rewrite) in film_modules(self.network, self.blocks).items():
                hooks.after(module, _hook(rewrite, *values[path]))
            yield
            if again:
                self._kept = stack.pop_all()

    def close(self) -> None:
        """Take away the hooks that stayed."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None


def _hook(rewrite: Callable[..., Tensor], scale: Tensor, shift: Tensor | None) -> AfterHook:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return rewrite(output, scale, shift)

    return hook


__all__ = ["Modulated"]
