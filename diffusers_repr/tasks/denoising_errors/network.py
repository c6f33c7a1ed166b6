"""The errors of a network, in batches over images, prompts and levels that shrink where memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.estimates import check_estimates, noise_cosine
from diffusers_repr.features.noise_policy import NoiseSource
from diffusers_repr.tasks.denoising_errors.conditions import ConditionRows
from diffusers_repr.tasks.denoising_errors.memory import smaller_batch
from diffusers_repr.tasks.denoising_errors.pairs import Asked
from diffusers_repr.tasks.denoising_errors.scores import check_bound, pair_error
from diffusers_repr.tasks.denoising_errors.shared_rows import SharedRows

_ENOUGH = 8  # estimates of a level, to tell from their mean cosine whether the network fits its scheduler


class NetworkErrors:
    """Evaluates pairs of (image, prompt) at noise levels: one row of a forward each.

    The noise of an image at a level depends on seed, image, level and draw alone: all prompts see the same, and no
    batch size changes it.

    Args:
        denoiser: The base.
        x0: Images as the network takes them, `(N, C, h, w)`; on the CPU, in its dtype.
        keys: Of each image, for its noise; see `image_keys`.
        conditions: Of every prompt.
        loss: See `Loss`.
        seed: Of the noise.
        batch_size: Rows a forward; made smaller, with a warning, where memory does not suffice.
        progress: Called with the number of rows after each forward.

    Raises:
        ValueError: For the loss `vlb` of a network with a learned variance.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        keys: Sequence[str],
        conditions: ConditionRows,
        loss: str = "l2",
        seed: int = 0,
        batch_size: int = 64,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.denoiser, self.x0, self.keys, self.conditions = denoiser, x0, list(keys), conditions
        self.loss, self.noise, self.batch_size, self.progress = (
            loss,
            NoiseSource("per_image", seed),
            batch_size,
            progress,
        )
        self.evaluations = 0
        self._shared = SharedRows(denoiser)
        self._cosines: dict[float, tuple[float, int]] = {}  # timestep -> sum and count
        if loss == "vlb":
            check_bound(denoiser)

    def __call__(self, asked: Asked) -> Tensor:
        """As `PairErrors`.

        Raises:
            FloatingPointError: If an error is no number.
            MemoryError: If one row is too much.
            ValueError: If the network's estimates of the noise point away from it: it has another scheduler.
        """
        found = torch.empty(len(asked), dtype=torch.float64)
        with torch.no_grad(), self.denoiser.evaluating():
            for rows in self.conditions.same_shapes(asked.prompts):
                self._fill(asked, rows, found)
        if not bool(found.isfinite().all()):
            at = int(found.isfinite().logical_not().nonzero()[0])
            raise FloatingPointError(
                f"The error of image {int(asked.images[at])} at timestep {float(asked.timesteps[at]):g} is not finite:"
                f" the weights of the base {self.denoiser.name or type(self.denoiser.model).__name__!r} are broken, or"
                f" its dtype ({self.denoiser.dtype}) is too narrow; try float32."
            )
        for time, (total, count) in self._cosines.items():
            if count >= _ENOUGH:
                check_estimates(self.denoiser, total / count, time)
        return found

    def _fill(self, asked: Asked, rows: Tensor, found: Tensor) -> None:
        start = 0
        while start < len(rows):
            part = rows[start : start + self.batch_size]
            try:
                found[part] = self._forward(asked.take(part))
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                self.batch_size = smaller_batch(len(part), error, "rows of one forward")
                continue
            start += len(part)
            self.evaluations += len(part)
            if self.progress is not None:
                self.progress(len(part))

    def _forward(self, asked: Asked) -> Tensor:
        """The errors of one batch; what several rows have in common is made once."""
        device = self.denoiser.device
        inputs = torch.stack([asked.images.double(), asked.timesteps, asked.draws.double()], 1)
        distinct, index = inputs.unique(dim=0, return_inverse=True)
        images = distinct[:, 0].long()
        rows = zip(images.tolist(), distinct[:, 1].tolist(), strict=True)
        keys = [f"{self.keys[image]}|{time!r}" for image, time in rows]
        noise = self.noise.draw(keys, distinct[:, 2].long().tolist(), self.x0.shape[1:])
        assert noise is not None
        noise, x0 = noise.to(device), self.x0[images].to(device)
        x_t = self.denoiser.add_noise(x0, distinct[:, 1], noise)
        index = index.to(device)
        level = self.denoiser.level(asked.timesteps)
        some = torch.empty(len(distinct), dtype=torch.long)
        some[index.cpu()] = torch.arange(len(asked))  # a row of each distinct input
        each = self.denoiser.level(distinct[:, 1])
        with self._shared(x_t, each, lambda: self.conditions.take(asked.prompts[some]), index):
            prediction = self.denoiser.predict(x_t[index], level, self.conditions.take(asked.prompts))
        self._note(asked.timesteps, noise_cosine(prediction.eps, noise[index]))
        return pair_error(prediction, noise[index], self.loss, self.denoiser.schedule)

    def _note(self, timesteps: Tensor, cosines: Tensor) -> None:
        cosines = cosines.double().cpu()
        for time in timesteps.unique().tolist():
            own, (total, count) = cosines[timesteps == time], self._cosines.get(time, (0.0, 0))
            self._cosines[time] = total + float(own.sum()), count + len(own)


__all__ = ["NetworkErrors"]
