"""Gradients of energies with respect to what the network takes, as corrections of eps or steps on the latents."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.gradient import (
    NO_GRAPH,
    GradientTape,
    frozen,
    gradient_of,
    refuse_inference_mode,
)
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.family import BatchLanes
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.guidance.base import GuidanceTerm
from diffusers_repr.noise import NoiseSchedule, Prediction, eps_shift_to_output, expand

ADAM_EPS = 1e-8
ADAM_BETAS = (0.9, 0.999)  # torch's own


class EpsGradient:
    """The weighted sum of energies of one call, and its gradient for the conditional rows.

    Where a request asks for both halves of the batch, it is the sum over the conditional and the null rows, and the
    gradient with respect to the samples, which both are made of.

    Args:
        denoiser: The model.
        schedule: Its noise process.
        call: The call.
        wanted: Terms with a `GradientRequest`, each with its weight.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        call: NetworkCall,
        wanted: Sequence[tuple[GuidanceTerm, float]],
    ) -> None:
        self.denoiser, self.schedule, self.call, self.wanted = denoiser, schedule, call, list(wanted)
        self.terms = [term for term, _ in wanted]
        self.requests = [term.gradient for term, _ in wanted if term.gradient is not None]
        self.reads_network = any(request.reads_network for request in self.requests)
        self.both = any(request.both for request in self.requests)
        self.halves = _halves(call, self.terms[0].label) if self.both else [call]
        self.found: Tensor | None = None  # the gradient, float32 or wider

    def begin(self, tape: GradientTape, inputs: Mapping[str, Any], *, stop: bool) -> dict[str, Any]:
        """Start the tape for a forward over the conditional rows, or all of them (`both`).

        Args:
            tape: Of the network.
            inputs: Its keyword inputs for these rows.
            stop: Leave the forward as soon as the gradient is known.

        Returns:
            The inputs to run it with.
        """
        x = self._leaf()
        needs_x0 = any(request.needs_x0 for request in self.requests)
        tape.begin(
            x,
            self._loss,
            list(dict.fromkeys(path for request in self.requests for path in request.layers)),
            at_output=needs_x0,
            stop=stop and not needs_x0,
            checkpoint=any(request.checkpoint for request in self.requests),
            modules=self._modules(),
        )
        usable = {name: _without_inference(value) for name, value in inputs.items()}
        return self.denoiser.family.with_sample(usable, torch.cat([x, x]) if self.both else x)

    def compute_direct(self) -> None:
        """The gradient of energies that do not read the network."""
        refuse_inference_mode()
        modules = self._modules()
        with torch.enable_grad(), frozen(*modules), eval_mode(*modules):
            self.found = gradient_of(self._loss, self._leaf(), {})

    def correction(self) -> Tensor | None:
        """Change of the network's output: eps + sigma times the gradient; None where there is no signal (alpha = 0).

        Pure noise tells nothing of the data, so the gradient of a true energy is zero there.
        """
        level = self.call.level
        if self.found is None or float(level.alpha) == 0:
            return None
        shift = expand(level.sigma, self.found) * self.found
        return eps_shift_to_output(shift, level, self.schedule.output, self.schedule.sigma_data)

    def _leaf(self) -> Tensor:
        x = self.call.x[self.call.batch.cond].detach().clone()
        return x.requires_grad_(True)

    def _modules(self) -> list[nn.Module]:
        return list(dict.fromkeys(module for request in self.requests for module in request.modules))

    def _loss(self, features: Mapping[str, Tensor], output: Tensor | None, x: Tensor) -> Tensor:
        maps = {path: self._as_map(path, value) for path, value in features.items()}
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for half in self.halves:
            rows = half.batch.cond if self.both else slice(None)
            x0 = None
            if output is not None:
                read = self.denoiser.family.output(output[rows], x)
                x0 = Prediction(read, x, half.level, self.schedule).x0
            for (term, weight), request in zip(self.wanted, self.requests, strict=True):
                own = {path: maps[path][rows] for path in request.layers}
                loss = request.loss(own, x0 if request.needs_x0 else None, half, x)
                _check_loss(loss, len(x), term.label)
                total = total + weight * loss.sum()
        return total

    def _as_map(self, path: str, value: Tensor) -> Tensor:
        if value.ndim != 3:
            return value
        found = self.denoiser.token_grid(path, value.shape[1], self.call.size)
        if found is None:
            return value
        return FeatureMap(value, *found).as_map()


def _halves(call: NetworkCall, label: str) -> list[NetworkCall]:
    """The call as one of its null rows and one of its conditional rows.

    Raises:
        ValueError: If it has no null rows.
    """
    if call.batch.null is None:
        raise ValueError(
            f"{label} sums its loss over the conditional and the null rows (published=True), and this call has no "
            "null rows: call a pipeline that guides in one batch, with guidance_scale above 1, or leave "
            "published=False."
        )
    return [dataclasses.replace(call, batch=BatchLanes(rows)) for rows in (call.batch.null, call.batch.cond)]


def _check_loss(loss: Any, rows: int, label: str) -> None:
    if not isinstance(loss, Tensor) or (loss.ndim and loss.shape != (rows,)):
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"The energy of {label} must be a scalar tensor, or one number a sample, ({rows},); got {got}."
        )
    if not loss.requires_grad:
        raise RuntimeError(f"{label}: {NO_GRAPH}")


def _without_inference(value: Any) -> Any:
    """Tensors made in inference mode (prompt embeddings, say) cannot be saved for a backward pass; copies can."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, Mapping):
        return {name: _without_inference(part) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_without_inference(part) for part in value)
    return value


class LatentSteps:
    """Steps on what the network takes, against gradients: what is kept from one to the next at one noise level.

    `latent_sign`: `-rate sign(g)`. `latent_adam`: a fresh Adam without weight decay, whose first step is
    `-rate g / (|g| + 1e-8)`: a sign step but where the gradient vanishes (Luo et al. 2024, arXiv 2312.02150). NaN
    stays NaN.

    Args:
        rate: Size of a step.
        update: `latent_sign` or `latent_adam`.
    """

    def __init__(self, rate: float, update: str) -> None:
        self.rate, self.update, self.count = rate, update, 0
        self._mean = self._square = torch.zeros(())

    def change(self, gradient: Tensor) -> Tensor:
        """The next step, in the shape of the gradient."""
        if self.update == "latent_sign":
            return -self.rate * torch.where(gradient.isnan(), gradient, gradient.sign())
        self.count += 1
        # Adam's averages with their bias corrected; each share is exactly 1 in the first step.
        first, second = ((1 - beta) / (1 - beta**self.count) for beta in ADAM_BETAS)
        self._mean = self._mean + first * (gradient - self._mean)
        self._square = self._square + second * (gradient.square() - self._square)
        return -self.rate * self._mean / (self._square.sqrt() + ADAM_EPS)
