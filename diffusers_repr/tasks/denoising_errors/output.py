"""What a zero-shot classifier says of images: classes, errors, how sure, at what cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.tasks.denoising_errors.pairs import Asked
from diffusers_repr.tasks.denoising_errors.picture import plot_curves


@dataclass(frozen=True, eq=False)
class ZeroShotOutput:
    """What was found of a batch of images.

    Attributes:
        labels: Name of the class of each image.
        ids: Its place among the classes, `(N,)`.
        errors: Mean error of each class, `(N, K)` float64: over the levels at which it was evaluated, which are fewer
            for classes that left early.
        confidence: Of the winner, `(N,)` in [0, 1]. Of a calibrated race its probability. Else how sure the pairs make
            it that no other class has a lower expected error (`confidence` of `denoising_errors.paired`), which tells
            of the noise, not of whether the model is right.
        probabilities: Of each class, `(N, K)`, as often right as they say on images like those of the calibration;
            None without one.
        decided: Whether the race ended by its test, `(N,)`; False: by the lowest mean after the last round. None of
            rules without a test.
        evaluations: Rows of network forwards each image took, `(N,)`.
        label_names: Name of each class.
        pairs: (image, prompt, timestep, draw) of every evaluation.
        pair_errors: Their errors, `(n,)` float64.
        of_prompt: Class of each prompt, `(P,)`.
    """

    labels: list[str]
    ids: Tensor
    errors: Tensor
    confidence: Tensor
    probabilities: Tensor | None
    decided: Tensor | None
    evaluations: Tensor
    label_names: tuple[str, ...]
    pairs: Asked
    pair_errors: Tensor
    of_prompt: Tensor

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """The `k` best classes of each image with their mean errors, lowest first; the winner stands first."""
        found = []
        for row, winner in zip(self.errors, self.ids.tolist(), strict=True):
            order = [winner, *(one for one in row.argsort(stable=True).tolist() if one != winner)]
            found.append([(self.label_names[one], float(row[one])) for one in order[:k]])
        return found

    def curves(self, at: int = 0) -> tuple[Tensor, Tensor]:
        """Error of each class by level, of one image.

        Args:
            at: Which image.

        Returns:
            Timesteps `(L,)`, least noisy first, and errors `(L, K)`, means over draws and prompts; NaN where a class
            was not evaluated.
        """
        own = self.pairs.images == at
        times, place = self.pairs.timesteps[own].unique(return_inverse=True)
        classes, count = self.of_prompt[self.pairs.prompts[own]], len(self.label_names)
        flat = torch.zeros(2, len(times) * count, dtype=torch.float64)
        where, values = place * count + classes, self.pair_errors[own]
        flat[0].index_add_(0, where, values)
        flat[1].index_add_(0, where, torch.ones_like(values))
        return times, (flat[0] / flat[1]).view(len(times), count)

    def plot(self, at: int = 0, image: Any = None, limit: int = 8) -> Any:
        """A picture of `curves`: how far the error of each class lies over the lowest of its level.

        Args:
            at: Which image.
            image: The image itself, to show beside it (PIL).
            limit: Classes at most, those with the lowest mean error.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: Without matplotlib.
        """
        times, errors = self.curves(at)
        order = [name for name, _ in self.top(limit)[at]]
        places = [self.label_names.index(name) for name in order]
        sure = (
            f"{self.labels[at]}: confidence {float(self.confidence[at]):.3f}, {int(self.evaluations[at])} evaluations"
        )
        return plot_curves(times, errors[:, places], order, sure, image)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        few = ", ".join(map(repr, self.labels[:5])) + (", ..." if len(self) > 5 else "")
        mean = float(self.evaluations.double().mean()) if len(self) else 0.0
        return f"ZeroShotOutput({len(self)} images: {few}; {mean:.1f} evaluations an image)"


__all__ = ["ZeroShotOutput"]
