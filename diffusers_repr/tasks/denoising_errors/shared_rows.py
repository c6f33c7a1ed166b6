"""What rows of a batch that differ in their prompt alone have in common, computed once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from diffusers_repr.capture.prefix import SharedPrefix, first_reader
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.noise import NoiseLevel

_TEXT = "encoder_hidden_states"


class SharedRows:
    """Runs the layers before the first that reads the prompt on distinct inputs only.

    That is exact for networks that read a prompt in cross-attention and nowhere before (`Family.read_late`: the U-Nets
    of Stable Diffusion 1 and 2); all others, and compiled ones, run every row from the start.

    Args:
        denoiser: The base.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self._prefix: SharedPrefix | None = None
        self._looked = False

    def __call__(
        self, x_t: Tensor, level: NoiseLevel, condition: Callable[[], Mapping[str, Any]], index: Tensor
    ) -> AbstractContextManager[None]:
        """A context in which the network is run on `x_t[index]`.

        Args:
            x_t: The distinct inputs, `(D, C, h, w)`.
            level: Of each, `(D,)`.
            condition: Gives any condition for each; what is shared does not see it.
            index: `(B,)`, on the network's device.
        """
        if 2 * len(x_t) > len(index) or (self._looked and self._prefix is None):
            return nullcontext()
        given = condition()

        def run() -> Any:
            return self.denoiser.predict(x_t, level, given)

        if not self._looked:
            self._prefix, self._looked = self._found(given, run), True
        return nullcontext() if self._prefix is None else self._prefix.shared(run, len(x_t), index)

    def _found(self, condition: Mapping[str, Any], run: Callable[[], Any]) -> SharedPrefix | None:
        told = {name for name, value in condition.items() if value is not None}
        if _TEXT not in told or not told <= set(self.denoiser.family.read_late):
            return None
        reader = first_reader(self.denoiser.model, _TEXT, run)
        return None if reader is None else SharedPrefix(self.denoiser.model, reader)


__all__ = ["SharedRows"]
