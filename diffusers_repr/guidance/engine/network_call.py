"""What a network call is: whose it is, its rows, its noise level."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_repr.capture.batching import map_rows
from diffusers_repr.capture.caches import refuse_caches
from diffusers_repr.capture.capture import refuse_compiled
from diffusers_repr.capture.lanes import NetworkCall
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.denoiser import COMPONENTS
from diffusers_repr.denoiser.family import BatchLanes, equal_halves
from diffusers_repr.noise import NoiseLevel, NoiseSchedule, sampler_level

_PLAIN = "Guide the plain module: pipe.unet = pipe.unet._orig_mod (or transformer), or load it anew."
_SINCE = (
    "It was not when it was guided: remove the guidance (handle.remove()) before a part of its network is compiled, "
    "and guide the plain module."
)
_ROUNDED = 2.0**-7  # a timestep divided and multiplied in bfloat16


class CallParser:
    """Reads network calls of one pipeline, or of a loop.

    Args:
        denoiser: The model.
        pipe: The pipeline that is guided; None for a loop of the user's.

    Attributes:
        scheduler: The sampler that is stepped, or None.
        schedule: The process that it samples.
        rescale: `guidance_rescale` of the running pipeline.
    """

    def __init__(self, denoiser: Denoiser, pipe: Any) -> None:
        self.denoiser, self.pipe = denoiser, pipe
        self.scheduler: Any = None
        self.schedule: NoiseSchedule = denoiser.schedule
        self.rescale = 0.0
        self._batches: dict[int, BatchLanes] = {}
        self._nsr: float | None = None  # of the call before in this run

    def new_run(self) -> None:
        """A sampling run begins: which rows are conditional is found anew, and the network is looked at again."""
        self._batches, self.rescale, self._nsr = {}, 0.0, None

    def read(self, inputs: dict[str, Any], first: FirstCall | None = None) -> tuple[NetworkCall, bool]:
        """The call with these keyword inputs.

        Args:
            inputs: All rows.
            first: The call made before it at the same step of the sampler, if any.

        Returns:
            The call, and whether it is a further one for the same samples at the same step.

        Raises:
            ValueError: If its lanes or its noise level cannot be told; if the network caches activations.
            RuntimeError: If the network or a part of it is compiled.
        """
        family = self.denoiser.family
        given = inputs[family.sample_name]
        rows = given.shape[0]
        level, scale = self._level(inputs)
        self._check_network(level)
        call = NetworkCall(inputs, rows, BatchLanes(slice(0, rows)), family.sample(inputs), level, scale)
        if first is not None and first.is_followed_by(call, given):
            return call, True
        if rows not in self._batches:
            self._batches[rows] = self._lanes(inputs)
        call.batch = self._batches[rows]
        return call, False

    def _check_network(self, level: NoiseLevel) -> None:
        """Look at the network where a run begins: of a loop without scheduler, where the noise does not fall."""
        nsr = float(level.nsr)
        if self._nsr is None or (self.scheduler is None and nsr >= self._nsr):
            if self.pipe is not None:
                check_seen(self.pipe, self.denoiser.model, called=True)
            check_plain(self.denoiser.model, _SINCE)
        self._nsr = nsr

    def _lanes(self, inputs: dict[str, Any]) -> BatchLanes:
        family = self.denoiser.family
        caller = calling_pipeline(self.denoiser.model)
        alone = BatchLanes(slice(0, inputs[family.sample_name].shape[0]))
        off = caller is not None and is_off(caller, self.denoiser.model)
        if caller is not None and self.pipe is None:
            lanes = alone if off else family.lanes(caller, inputs)
            if lanes.null is not None or getattr(caller, "do_classifier_free_guidance", False):
                raise ValueError(
                    f"guide was given a Denoiser, but a {type(caller).__name__} calls its network: guide(pipe, ...)."
                )
            return lanes
        if caller is not None:
            refuse_own_guidance(caller)
            if getattr(caller, "do_perturbed_attention_guidance", False):
                raise ValueError(f"{type(caller).__name__} perturbs attention by itself; call it with pag_scale=0.")
            self.rescale = float(getattr(caller, "guidance_rescale", 0) or 0)
            return alone if off else family.lanes(caller, inputs)
        if self.pipe is not None and family.conditioning == "text" and equal_halves(inputs[family.sample_name]):
            raise ValueError(
                f"A loop of your own calls the network of the guided {type(self.pipe).__name__} with two equal "
                "halves; which rows have the condition is not known. Use guide(Denoiser.from_pipe(pipe), null=...), "
                "and call the network with the conditional rows only."
            )
        return family.lanes(None if family.conditioning == "text" else self.pipe, inputs)

    def refuse_rescale(self) -> None:
        """Raise ValueError if the running pipeline rescales what its own guidance makes."""
        if self.rescale > 0:
            raise ValueError(
                f"guidance_rescale={self.rescale} renormalises the pipeline's own guidance, and with it what is added "
                "here. Call the pipeline with guidance_rescale=0; for rescaled classifier-free guidance give "
                f"CFG(scale, rescale={self.rescale}), which replaces the pipeline's."
            )

    def _level(self, inputs: Mapping[str, Any]) -> tuple[NoiseLevel, float]:
        family = self.denoiser.family
        told = torch.as_tensor(inputs[family.timestep_name])
        if told.numel() > 1 and self.pipe is None and not bool((told == told.flatten()[0]).all()):
            raise ValueError(f"Guidance needs one noise level for the whole batch; got timesteps {told.tolist()}.")
        told = family.training_timestep(told.flatten()[0])
        if self.scheduler is None:
            return self.schedule.resolve(float(told)), 1.0
        where = sampler_level(self.scheduler, told, self.schedule)
        if told.device.type == "cpu":  # elsewhere it would have to be waited for
            at, given = float(where.level.timestep), float(told)
            if abs(at - given) > _ROUNDED * max(abs(at), abs(given)):
                raise ValueError(
                    f"The network is called at timestep {given:g}, but the {type(self.scheduler).__name__} stands at "
                    f"{at:g}. In a loop of your own call `scheduler.step` after each call of the network; what is "
                    "no step of the sampler belongs outside of the guidance."
                )
        return where.level, where.scale


class FirstCall:
    """The first network call at a step, to know further ones by.

    Args:
        call: That call, as the pipeline made it.
        given: The tensor that holds its noisy input.
    """

    def __init__(self, call: NetworkCall, given: Tensor) -> None:
        self.samples, self.level = call.samples, call.level
        self._given, self._version = given, _version(given)
        self._x = call.x[call.batch.cond]
        self._x_version = _version(self._x)

    def is_followed_by(self, call: NetworkCall, given: Tensor) -> bool:
        """Whether another call takes the same samples at the same level."""
        if call.rows != self.samples or call.level.timestep != self.level.timestep:
            return False
        if _version(self._given) != self._version or _version(self._x) != self._x_version:
            return False  # changed in place since
        if given is self._given and not given.is_inference():
            return True
        return call.x.shape == self._x.shape and torch.equal(call.x, self._x)


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def calling_pipeline(model: nn.Module) -> Any:
    """The pipeline in whose `__call__` the network is being called; None outside of one."""
    return _running_call(model).get("self")


def is_off(pipe: Any, model: nn.Module) -> bool:
    """Whether the running call of a pipeline is told to do without its own guidance, `guidance_scale` up to 1.

    For the pipelines that have no `do_classifier_free_guidance` (DiT, PixArt): False is said for all others.
    """
    if getattr(pipe, "do_classifier_free_guidance", None) is not None:
        return False
    scale = _running_call(model).get("guidance_scale")
    return isinstance(scale, int | float) and scale <= 1


def _running_call(model: nn.Module) -> Mapping[str, Any]:
    """Arguments of the pipeline's `__call__` in which the network is being called; none outside of one."""
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            owner = frame.f_locals.get("self")
            if isinstance(owner, DiffusionPipeline) and component_of(owner, model) is not None:
                return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def component_of(pipe: Any, model: nn.Module) -> str | None:
    """Name of the pipeline's component that is the network, or its compiled wrapper."""
    for name in COMPONENTS:
        component = getattr(pipe, name, None)
        if component is not None and getattr(component, "_orig_mod", component) is model:
            return name
    return None


def check_plain(model: nn.Module, remedy: str = _PLAIN) -> None:
    """Raise unless hooks on a network act, and see the activations of the call that is being made.

    Args:
        model: The network.
        remedy: What to do about a compiled one.

    Raises:
        RuntimeError: If it, or a part of it, is compiled.
        ValueError: If it uses activations of earlier calls.
    """
    refuse_compiled(model, remedy)
    refuse_caches(model, "which lanes would mix")


def refuse_own_guidance(pipe: Any) -> None:
    """Raise ValueError for a pipeline that adds lanes of its own to the batch, or denoises more than the image."""
    if getattr(pipe, "class_token", None) is not None:
        raise ValueError(
            f"This {type(pipe).__name__} denoises a class token together with the image (REG), guidance would move "
            "the image alone. Use the guidance_scale of its call, which moves both."
        )
    name = type(pipe).__name__
    if "SAG" in name or "InstructPix2Pix" in name or "Perp" in name:
        raise ValueError(f"{name} has more than a conditional and a null lane; use the plain pipeline and guide that.")


def check_seen(pipe: Any, model: nn.Module, *, called: bool) -> None:
    """Raise RuntimeError if the pipeline's network is not the one that is guided, or was compiled since.

    Args:
        pipe: The pipeline.
        model: What is guided.
        called: Whether it has been called for this step.
    """
    name = component_of(pipe, model)
    gone = name is None and not called
    compiled = getattr(model, "_compiled_call_impl", None) is not None or (
        name is not None and getattr(pipe, name) is not model
    )
    if gone or compiled:
        why = "has another network than was guided" if gone else "compiled its network after it was guided"
        raise RuntimeError(
            f"{type(pipe).__name__} {why}, and nothing would be guided. Remove the guidance (handle.remove()) before "
            "a network is replaced or compiled, and guide the plain module."
        )


def not_stepped(scheduler: Any) -> str:
    """Message for a step that the scheduler did not make between two calls of the network."""
    return (
        f"The network is called again, but its {type(scheduler).__name__} was not stepped after the last call: what a "
        "guidance did to the latents or the prediction would be lost. Step the scheduler that is guided, by its "
        "`step`: the pipeline's own, or the one given as guide(denoiser, ..., scheduler=)."
    )


def null_inputs(null: Mapping[str, Any], samples: int, unbatched: Collection[str]) -> Mapping[str, Any]:
    """The null condition with as many rows as a call has, from one row or as many.

    Raises:
        ValueError: If it has another number of rows.
    """
    rows: set[int] = set()
    for name, value in null.items():
        if name not in unbatched and isinstance(value, Tensor) and value.ndim:
            rows.add(value.shape[0])
    if samples in rows or not rows:
        return null
    if rows != {1}:
        raise ValueError(f"The null condition has {max(rows)} rows; the call has {samples}. Give 1 or {samples}.")
    return map_rows(null, 1, lambda value: value.expand(samples, *value.shape[1:]), unbatched)


def with_first(output: Any, value: Tensor) -> Any:
    """What a network returned, with another first tensor."""
    if isinstance(output, Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    first = next(iter(output.keys()))
    return type(output)(**{**output, first: value})
