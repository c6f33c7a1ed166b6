"""Diffusion with perceptual loss (arXiv 2401.00110): a second stage of training, by own middle features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_repr.capture import capture
from diffusers_repr.capture.names import check_layers
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.family import floating_dtype
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.noise import NoiseLevel, Prediction, add_noise, expand
from diffusers_repr.objectives.auxiliary.base import (
    AuxiliaryLoss,
    LossHost,
    Observation,
    full_precision,
    widen,
    widen_inputs,
)
from diffusers_repr.objectives.auxiliary.self_teacher import frozen_copy
from diffusers_repr.objectives.diffusion import DiffusionObjective
from diffusers_repr.objectives.times import TimeSampler

MIDDLE = "mid_block"


def noised_again(prediction: Prediction, level: NoiseLevel, clip: float | None = None) -> Tensor:
    """`alpha' x0_hat + sigma' eps_hat`: the predicted image with the predicted noise, at another level.

    At the level of the prediction it is x_t, whatever was predicted.

    Args:
        prediction: Of any form.
        level: Resolved, one a sample.
        clip: x0_hat is kept within plus and minus this, and eps_hat is what x_t then leaves.

    Raises:
        ValueError: Where alpha = 0 leaves x0_hat of an epsilon network undefined.

    Example:
        >>> from diffusers_repr.noise import NoiseSchedule
        >>> flow = NoiseSchedule("flow", "velocity")
        >>> prediction = Prediction(torch.zeros(1, 2), torch.ones(1, 2), flow.resolve(250), flow)
        >>> noised_again(prediction, flow.resolve(500))
        tensor([[1., 1.]])
    """
    x0, eps = prediction.x0, prediction.eps
    if clip is not None:
        x0 = x0.clamp(-clip, clip)
        alpha, sigma = expand(prediction.level.alpha, x0), expand(prediction.level.sigma, x0)
        eps = torch.where(x0 == prediction.x0, eps, (prediction.x_t - alpha * x0) / sigma)
    return add_noise(x0, level, eps)


class PerceptualLoss(AuxiliaryLoss):
    """Mean squared distance of a frozen copy's middle features, of the predicted and the true image noised alike.

    For `t'` of its own and the noise of the batch: `|f*(a' x0_hat + s' eps_hat, t') - f*(a' x_0 + s' eps, t')|^2`, f*
    being the network as it was when the loss was attached, up to the layer and no further. Noise that is predicted as
    it is gives 0, and so does `t' = t`. The gradient reaches the network by what it predicts alone.

    Args:
        layer: Path of the layer; if None the middle block of a U-Net, and of a transformer the last block of the first
            third.
        weight: Of the loss.
        time_sampling: How `t'` is drawn; uniform, as in the paper.
        clip_x0: Bound of x0_hat, which an epsilon network at high noise can put far outside of the data. None: as the
            scheduler's config has it (`clip_sample`, `clip_sample_range`); 0: none.

    Raises:
        ValueError: For a bound below 0.
    """

    runs_network = True
    host: LossHost

    def __init__(
        self,
        layer: str | None = None,
        weight: float = 1.0,
        time_sampling: TimeSampler | None = None,
        clip_x0: float | None = None,
    ) -> None:
        super().__init__("perceptual", weight)
        if clip_x0 is not None and not clip_x0 >= 0:
            raise ValueError(f"clip_x0 is 0 (no bound) or more; got {clip_x0}.")
        self.layer, self.clip_x0 = layer, clip_x0
        self.time_sampling = time_sampling or TimeSampler()

    def attach(self, host: LossHost) -> None:
        """Find the layer, and keep a frozen copy of the network."""
        self.layer = self.layer or default_layer(host)
        check_layers(host.network, self.layer)
        self.__dict__["host"] = host  # beside the modules: the objective is no part of the loss
        self.__dict__["copy"] = host.freeze("perceptual-network", frozen_copy(host.network))
        if self.clip_x0 is None:
            config = getattr(host.denoiser.scheduler, "config", {})
            self.clip_x0 = float(config.get("clip_sample_range", 1.0)) if config.get("clip_sample") else 0.0

    @property
    def frozen(self) -> nn.Module:
        """The copy."""
        return self.__dict__["copy"]

    def forward(self, seen: Observation) -> Tensor:
        """Mean over samples, channels and places."""
        noisy, schedule = seen.noisy, self.host.denoiser.schedule
        level = self.time_sampling.draw(schedule, len(noisy.x0), noisy.batch.get("generator")).to(noisy.x0.device)
        prediction = Prediction(widen(seen.prediction), noisy.x_t, noisy.level, schedule)
        with full_precision(noisy.x0.device):
            guess = noised_again(prediction, level, self.clip_x0 or None)
            with torch.no_grad():
                wanted = self.middle(add_noise(noisy.x0, level, noisy.noise), level, noisy.condition)
            return F.mse_loss(self.middle(guess, level, noisy.condition), wanted)

    def middle(self, x_t: Tensor, level: NoiseLevel, condition: Mapping[str, Any]) -> Tensor:
        """Features of the frozen copy, float32 or wider; the rest of the network does not run."""
        assert self.layer is not None
        x_t = x_t.to(floating_dtype(self.frozen))
        inputs = widen_inputs(self.host.denoiser.network_inputs(x_t, level, condition))
        with capture(self.frozen, self.layer) as tape:
            self.frozen(**inputs)
        return widen(tape[self.layer])

    def describe(self) -> dict[str, Any]:
        """With the layer, the draw of t', the bound and the weights of the copy."""
        times = [self.time_sampling.kind, self.time_sampling.mean, self.time_sampling.std]
        own = {"layer": self.layer, "times": times, "clip_x0": self.clip_x0}
        return {**super().describe(), **own, "frozen": weights_hash(self.frozen)}


class PerceptualObjective(DiffusionObjective):
    """The second stage: `PerceptualLoss` alone, from a trained network on (arXiv 2401.00110).

    Logs the denoising loss too, which counts by `denoising_weight`.

    Args:
        denoiser: Trained; any family, and epsilon, v and flow networks alike.
        layer: See `PerceptualLoss`.
        losses: Further losses.
        perceptual_times: How `t'` is drawn.
        clip_x0: See `PerceptualLoss`.
        denoising_weight: Of the denoising loss; 0 in the paper.
        **settings: Of `DiffusionObjective`.

    Raises:
        ValueError: For a weight below 0, a layer that is not there, and as `DiffusionObjective`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        layer: str | None = None,
        *,
        losses: Sequence[AuxiliaryLoss] = (),
        perceptual_times: TimeSampler | None = None,
        clip_x0: float | None = None,
        denoising_weight: float = 0.0,
        **settings: Any,
    ) -> None:
        if not 0 <= denoising_weight < float("inf"):
            raise ValueError(f"denoising_weight is finite and not negative; got {denoising_weight}.")
        perceptual = PerceptualLoss(layer, time_sampling=perceptual_times, clip_x0=clip_x0)
        super().__init__(denoiser, losses=[perceptual, *losses], **settings)
        self.denoising_weight = denoising_weight

    def loss_weights(self) -> dict[str, float]:
        """See `DiffusionObjective`."""
        return {**super().loss_weights(), "denoising": self.denoising_weight}

    def identity(self) -> dict[str, Any]:
        """With the weight of the denoising loss."""
        return {**super().identity(), "denoising_weight": self.denoising_weight}


def default_layer(host: LossHost) -> str:
    """The middle block of a U-Net; of a transformer the last block of the first third.

    A transformer has no narrowest place. Samples of a SiT came out no better behind half of its blocks than behind a
    third, for an eighth more of a step's operations (`docs/results/conditions`).

    Raises:
        ValueError: For a network with neither.
    """
    if getattr(host.network, MIDDLE, None) is not None:
        return MIDDLE
    blocks = host.denoiser.family.stack(host.network)
    return blocks[max(len(blocks) // 3, 1) - 1]


__all__ = ["PerceptualLoss", "PerceptualObjective", "default_layer", "noised_again"]
