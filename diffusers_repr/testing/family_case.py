"""What `check_family` tries a family with: a noisy input, a level, a condition and another one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Condition, Denoiser
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.noise import NoiseLevel


class Lacks(Exception):
    """The family does not tell what is needed; says what to write."""


class Wrong(Exception):
    """What the family tells does not hold; says what to write."""


@dataclass(frozen=True)
class FamilyCase:
    """Two samples for a denoiser.

    Attributes:
        denoiser: The network and its family.
        size: Of the images, in pixels: (H, W), of videos (frames, H, W).
        level: In the middle of the range.
        x_t: `(2, C, h, w)` or `(2, C, f, h, w)`.
        condition: Of the two samples.
        null: Other inputs of the same kind, which guidance leads away from; None without a condition.
        why_no_null: Why there is none.
    """

    denoiser: Denoiser
    size: tuple[int, ...]
    level: NoiseLevel
    x_t: Tensor
    condition: Condition
    null: Mapping[str, Any] | None
    why_no_null: str

    @property
    def latent(self) -> tuple[int, ...]:
        """Size of x_0."""
        return tuple(self.x_t.shape[2:])

    def inputs(self) -> dict[str, Any]:
        """Keyword inputs of the network."""
        return self.denoiser.network_inputs(self.x_t, self.level, self.condition.kwargs())

    @torch.no_grad()
    def output(self, condition: Mapping[str, Any] | None = None, x_t: Tensor | None = None) -> Tensor:
        """The network's prediction."""
        given = self.condition.kwargs() if condition is None else condition
        with self.denoiser.evaluating():
            return self.denoiser.predict(self.x_t if x_t is None else x_t, self.level, given).output


def make_case(denoiser: Denoiser, image_size: ImageSize, condition: Mapping[str, Any]) -> FamilyCase:
    """Raises `Wrong` where the family does not tell channels or size."""
    family = denoiser.family
    size: tuple[int, ...] | None = denoiser.resize_to(image_size)
    if size is None:
        raise Wrong(f"size() tells none. Write `def size(self)` in {type(family).__name__}, or pass image_size=.")
    small = denoiser.latent_size(size)
    try:
        channels = family.channels()
    except KeyError as error:
        raise Wrong(
            f"channels() needs {error} in the config, which is not there. Write `def channels(self)`."
        ) from error
    x_t = torch.randn(2, channels, *small, generator=torch.Generator().manual_seed(0))
    low, high = denoiser.schedule.timestep_range
    level = denoiser.level(round((low + high) / 2) if high - low > 2 else (low + high) / 2)
    made = _condition(denoiser, size, condition)
    null, why = _null(denoiser, made)
    return FamilyCase(denoiser, size, level, x_t.to(denoiser.device, denoiser.dtype), made, null, why)


def _condition(denoiser: Denoiser, size: tuple[int, ...], given: Mapping[str, Any]) -> Condition:
    if given:
        return denoiser.condition(**given, batch=2, size=size)
    if denoiser.conditioner.argument == "class_labels" and denoiser.conditioner.conditional:
        return denoiser.condition(class_labels=[0, 1 % denoiser.family.classes()[0]], batch=2, size=size)
    if denoiser.conditioner.argument == "prompt" and denoiser.pipe is not None:
        return denoiser.condition(["a cat", "a dog"], batch=2, size=size)
    example = denoiser.family.example(2, str(denoiser.device))
    if example:  # meant for shapes; drawn numbers act where zeros would not
        drawn = {name: _drawn(value) for name, value in example.items()}
        return denoiser.condition(embeddings=drawn, batch=2, size=size)
    return denoiser.condition(batch=2, size=size)


def _drawn(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1:
        return torch.randn(value.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(value)
    return value


def _null(denoiser: Denoiser, condition: Condition) -> tuple[Mapping[str, Any] | None, str]:
    """Other inputs: the null class, or embeddings made smaller."""
    inputs = condition.kwargs()
    if not inputs:
        return None, "the network takes no condition"
    if denoiser.family.conditioning == "class":
        if denoiser.conditioner.has_null:
            return denoiser.conditioner.null(2), ""
        return None, "no null class is known. Write `def classes(self): return number, null_id`"
    changed = {
        name: value / 2 if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1 else value
        for name, value in inputs.items()
        if name not in denoiser.family.unbatched
    }
    return {**inputs, **changed}, ""


__all__ = ["FamilyCase", "Lacks", "Wrong", "make_case"]
