"""`Guider`: the interface of diffusers' modular pipelines, and what of our guidances it can express.

A guider is asked, step by step, for the conditions to call the network with, sees the network before and after each of
these calls, and combines what they return. So terms of predictions of one input fit: `CFG`, `PAG`, `AutoGuidance`.
Gradients and passes whose input follows from a prediction (`SAG`) do not; `guide` has them, on classic pipelines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg
from torch import Tensor, nn

from diffusers_repr.capture.caches import refuse_caches
from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.capture.forwards import Replacement, replace_forward
from diffusers_repr.guidance.base import Guidance
from diffusers_repr.guidance.cfg import CFG
from diffusers_repr.guidance.guide import is_guided
from diffusers_repr.guidance.step import widened

NegativePrediction = Replacement  # gives the output of the negative lane

_COND, _NULL, _NEGATIVE = "pred_cond", "pred_uncond", "pred_negative"
_SLACK = 1e-3  # timesteps; of float32 sigmas
_PLAIN = "Give the pipeline the plain network: pipe.update_components(unet=model._orig_mod), or load it anew."


# A guider is written by subclassing: `_input_predictions`, `_enabled`, `_step`, `_num_inference_steps`,
# `_count_prepared` and the two `_prepare_batch` are what diffusers' own guiders are made of, private in name alone. If
# one changes, a run fails at its first step.
class Guider(BaseGuidance):
    """Classifier-free guidance, and the difference from a negative prediction of the conditional input.

    The conditional, the null and the negative prediction (perturbed attention's, or a weaker network's) are one call
    of the network each: that is the interface. Lanes of weight 0 at a step are not run.

    Args:
        cfg: Classifier-free guidance; scale 1 is off.
        term: What the negative prediction is weighted by, or None.
        num_train_timesteps: T of the adaptive scale.
        enabled: As for all guiders.
    """

    _input_predictions: Any = [_COND, _NULL, _NEGATIVE]

    def __init__(self, cfg: CFG, term: Guidance | None, num_train_timesteps: int, enabled: bool) -> None:
        super().__init__(0.0, 1.0, enabled)
        self._cfg, self._term, self._train_steps = cfg, term, num_train_timesteps
        self._undo: Callable[[], None] | None = None
        self._forget()

    def _forget(self) -> None:
        self._bound: tuple[nn.Module, NegativePrediction] | None = None
        self._acted: set[str] = set()
        self._warned: set[str] = set()
        self._now: float | None = None  # the timestep, where it is asked for

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance; 1 is off."""
        return self._cfg.scale

    # What is run

    @property
    def num_conditions(self) -> int:
        """Different conditions that a run needs: 2 with classifier-free guidance (pipelines encode the null then)."""
        return 1 + (self._enabled and self._cfg.scale != 1)

    @property
    def is_conditional(self) -> bool:
        """Whether the call that was prepared has the condition."""
        return self._lane() != _NULL

    def _weight(self, config: Guidance, off: float) -> float:
        """Scale at the timestep of the step; `off` outside of the interval."""
        at = self._now
        if not self._enabled or config.scale == off:
            return off
        if at is None:
            return config.scale
        if config.interval is not None:
            low, high = (float(end) for end in config.interval)  # type: ignore[arg-type]
            if not low - _SLACK <= at <= high + _SLACK:
                return off
        return max(0.0, config.scale - config.adaptive * (self._train_steps - at)) if config.adaptive else config.scale

    def _weights(self) -> tuple[float, float]:
        return self._weight(self._cfg, 1.0), 0.0 if self._term is None else self._weight(self._term, 0.0)

    def _lanes(self) -> list[str]:
        cfg, weight = self._weights()
        return [_COND] + [_NULL] * (cfg != 1) + [_NEGATIVE] * (weight != 0)

    def _lane(self) -> str | None:
        lanes, at = self._lanes(), self._count_prepared - 1
        return lanes[at] if 0 <= at < len(lanes) else None

    # The interface

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """A step begins, at a timestep of the sampler."""
        self._restore()
        if step == 0:
            self._judge(finished=True)
            self._forget()
        super().set_state(step, num_inference_steps, timestep)
        used = [config for config in (self._cfg, self._term) if config is not None]
        if any(config.interval is not None or config.adaptive for config in used):
            self._now = float(torch.as_tensor(timestep).flatten()[0])

    def prepare_inputs(self, data: Any) -> list[Any]:
        """One batch of conditions a lane, from pairs (conditional, null) by name.

        Raises:
            ValueError: If classifier-free guidance is on and the pipeline has no null condition.
        """
        pairs = [value for value in data.values() if isinstance(value, tuple)]
        self._check_null(pairs)
        return [self._prepare_batch(data, int(lane == _NULL), lane) for lane in self._lanes()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """As `prepare_inputs`, from names of fields."""
        names = [value for value in input_fields.values() if isinstance(value, tuple)]
        self._check_null([tuple(getattr(data, name, None) for name in pair) for pair in names])
        return [
            self._prepare_batch_from_block_state(input_fields, data, int(lane == _NULL), lane)
            for lane in self._lanes()
        ]

    def _check_null(self, pairs: Sequence[tuple[Any, ...]]) -> None:
        if _NULL in self._lanes() and all(pair[1] is None for pair in pairs):
            raise ValueError(
                f"{type(self).__name__}(guidance_scale={self._cfg.scale}) needs the null condition, and the pipeline "
                "made none. Set the guider before the text is encoded, and give a negative_prompt (an empty one does)."
            )

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Before a call of the network: in the negative lane this thread's next call, and no other, is changed.

        Raises:
            TypeError: For a network of an unknown family.
            ValueError: If the guidance cannot act on it.
            RuntimeError: If it is compiled.
        """
        self._restore()
        super().prepare_models(denoiser)
        if _NEGATIVE not in self._lanes():
            return
        if self._bound is None or self._bound[0] is not denoiser:
            refuse_compiled(denoiser, _PLAIN)
            if is_guided(denoiser):
                raise ValueError(
                    f"This {type(denoiser).__name__} is guided by guide(...) already; give it all guidances, and the "
                    "pipeline a guider for classifier-free guidance alone, or remove the other first."
                )
            refuse_caches(denoiser, "which lanes would mix")
            self._bound = denoiser, self._negative(denoiser)
        if self._lane() != _NEGATIVE:
            return
        negative = self._bound[1]

        def run(inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._restore()
            return negative(inner, args, kwargs)

        self._undo = replace_forward(denoiser, run)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """After a call of the network: it is as before (as the call itself left it, also by an exception)."""
        self._restore()

    def _restore(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def _negative(self, denoiser: nn.Module) -> NegativePrediction:
        raise NotImplementedError

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """The guided prediction, from batches that hold a `noise_pred` each."""
        got = {getattr(batch, self._identifier_key): batch.noise_pred for batch in data}
        if list(got) != self._lanes():
            raise ValueError(f"{type(self).__name__} expects predictions {self._lanes()}; got {list(got)}.")
        return self.forward(**got)

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, pred_negative: Tensor | None = None
    ) -> GuiderOutput:
        """`null + s (cond - null)`, rescaled if asked for, `+ w (cond - negative)`.

        All are of one input, so this is the same in every form of prediction.

        Args:
            pred_cond: Conditional prediction, `(B, ...)`.
            pred_uncond: Null prediction; None without classifier-free guidance at this step.
            pred_negative: Prediction of the perturbed or weaker lane; None without it at this step.
        """
        cfg, weight = self._weights()
        pred = pred_cond
        if pred_uncond is not None:
            self._acted.add("CFG")
            pred = pred_uncond + cfg * (pred_cond - pred_uncond)
            if self._cfg.rescale:
                pred = rescale_noise_cfg(pred, pred_cond, self._cfg.rescale)
        if pred_negative is not None:
            self._acted.add(type(self._term).__name__)
            away = widened(pred_cond) - widened(pred_negative)
            pred = (widened(pred) + weight * away).to(pred_cond.dtype)
        self._judge(finished=False)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _judge(self, finished: bool) -> None:
        """Warn of what acted at no step of a run; its last step is known for sure only when the next run begins."""
        if self._step is None or self._step < self._num_inference_steps - 1:  # or the run was broken off
            return
        self._bound = None
        if not (self._enabled or self.config["enabled"]):
            return
        for config, off in ((self._cfg, 1.0), (self._term, 0.0)):
            label = type(config).__name__
            if config is None or config.scale == off or label in self._acted | self._warned:
                continue
            ahead = config.interval is not None and self._now is not None and self._now > float(config.interval[1])  # type: ignore[arg-type]
            if finished or not ahead:
                self._warned.add(label)
                why = f"interval={config.interval}, the last timestep was {self._now}"
                why = why if self._enabled else "the pipeline disables guiders for this network"
                warnings.warn(f"{label} acted at no step of a run: {why}.", stacklevel=4)
