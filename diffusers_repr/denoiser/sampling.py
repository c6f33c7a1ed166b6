"""What pipelines that sample share: the state that callbacks read, checks of what a call is given, images out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from diffusers_repr.denoiser.stored_prior import StoredPriorMixin
from diffusers_repr.hub.checks import check_whole

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class SamplingMixin(StoredPriorMixin):
    """Base, before `DiffusionPipeline`, of a pipeline with a loop of its own: what diffusers' callbacks read.

    A callback may set `pipe._guidance_scale` (1 or less, or 0 of a classifier's guidance, is off) and
    `pipe._interrupt`; both act from the next step on.
    """

    _callback_tensor_inputs: list[str] = ["latents"]
    _guidance_scale = 1.0
    _interrupt = False
    _num_timesteps = 0

    @property
    def num_timesteps(self) -> int:
        """Network calls of the newest call; the last step that a callback hears of is one less."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Of the newest call; a callback may change it by `pipe._guidance_scale = ...`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the network is now called with null and conditional rows, in this order."""
        return False

    @property
    def interrupt(self) -> bool:
        """Whether the rest of the steps is left out: a callback may set `pipe._interrupt = True`."""
        return self._interrupt

    def _denoise(
        self: Any,
        timesteps: Tensor,
        tensors: dict[str, Any],
        predict: Callable[[int, Tensor, dict[str, Any]], Mapping[str, Tensor]],
        schedulers: Mapping[str, Any],
        extra: Mapping[str, Any],
        callback: Callable[..., dict[str, Any] | None] | None,
        names: Sequence[str],
    ) -> dict[str, Any]:
        """The sampling loop: every timestep is predicted, stepped and told to the callback.

        Args:
            timesteps: Of the sampler, one a network call.
            tensors: All that a callback may see or change, by name; those that are stepped keep their dtype.
            predict: `(step, timestep, tensors)` to what the samplers step with, by the names of `schedulers`.
            schedulers: Name of a tensor -> the sampler that steps it.
            extra: Further arguments of `step`, as `step_arguments` gives them.
            callback: After each step, or None.
            names: Of the tensors it gets.

        Returns:
            The tensors at the end.
        """
        dtypes = {name: tensors[name].dtype for name in schedulers}
        for step, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                continue
            outputs = predict(step, t, tensors)
            for name, scheduler in schedulers.items():
                stepped = scheduler.step(outputs[name], t, tensors[name], return_dict=False, **extra)[0]
                tensors[name] = stepped.to(dtypes[name])
            tensors = call_back(callback, self, step, t, tensors, names)
        return tensors


# Numbers


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, above: bool = False) -> float:
    """A finite number from `low` (which it must exceed if `above`) to `high`.

    Raises:
        TypeError: For what is no number.
        ValueError: For NaN, infinity and numbers outside of the range.

    Example:
        >>> check_number("strength", 2, 0, 1, above=True)
        Traceback (most recent call last):
        ...
        ValueError: strength lies above 0 and up to 1; got 2.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r} ({type(value).__name__}).")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite; got {value}.")
    if number < low or number > high or (above and number == low):
        start = f"above {low:g}" if above else f"from {low:g}"
        raise ValueError(f"{name} lies {start}{' and up' if above else ''} to {high:g}; got {value}.")
    return number


def count_samples(**given: Any) -> int:
    """Number of samples, on which all that is given one a sample must agree; 1 if nothing tells it.

    Args:
        **given: By its name. `batch_size` is a number, `generator` tells where it is a list, `latents` by their
            length, and all else too unless it is one for all: of length 1. None tells nothing.

    Raises:
        TypeError: For a `batch_size` that is no whole number.
        ValueError: For numbers that differ, or none.

    Example:
        >>> count_samples(batch_size=None, class_labels=torch.tensor([3, 5]))
        2
    """
    counts: dict[str, int] = {}
    for name, value in given.items():
        if name == "batch_size" and value is not None:
            counts[name] = check_whole(f"How many samples? {name}", value)
        elif name == "generator":
            if check_generator(value):
                counts[name] = len(value)
        elif value is not None and (name == "latents" or len(value) != 1):
            counts[name] = len(value)
    if len(set(counts.values())) > 1 or min(counts.values(), default=1) < 1:
        raise ValueError(f"How many samples? {', '.join(f'{name}: {count}' for name, count in counts.items())}.")
    return next(iter(counts.values()), 1)


def check_generator(generator: Any) -> bool:
    """Whether there is one a sample.

    Raises:
        TypeError: For what is neither a `torch.Generator` nor a list of them.
    """
    several = isinstance(generator, (list, tuple))
    if generator is not None and not all(
        isinstance(one, torch.Generator) for one in (generator if several else [generator])
    ):
        raise TypeError(
            f"generator is a torch.Generator or one a sample; got {generator!r}. Of a seed: "
            "torch.Generator().manual_seed(seed)."
        )
    return several


def repeat_rows(times: Any, **rows: Tensor | None) -> list[Tensor | None]:
    """Each row as often as `num_images_per_label` says, copies side by side.

    Args:
        times: 1 or more.
        **rows: What samples are conditioned on, by its name.

    Raises:
        TypeError: For what is no whole number.
        ValueError: Below 1, and where there is nothing to repeat.
    """
    times = check_whole("num_images_per_label", times)
    if times > 1 and all(row is None for row in rows.values()):
        raise ValueError(
            f"num_images_per_label={times} repeats what is given by {' or '.join(rows)}, and nothing is: pass it, or "
            "batch_size."
        )
    return [row if row is None or times == 1 else row.repeat_interleave(times, 0) for row in rows.values()]


# The sample


def check_latents(latents: Any, channels: int, size: tuple[int, int] | None = None, multiple: int = 1) -> None:
    """Latents to start from.

    Args:
        latents: Finite floats `(B, channels, H, W)`.
        channels: Of the network's input.
        size: `(H, W)` of a network that takes no other.
        multiple: What H and W must be multiples of.

    Raises:
        TypeError: For what is no tensor.
        ValueError: For other shapes and dtypes, NaN and infinity.
    """
    h, w = size or ("H", "W")
    shape = f"(B, {channels}, {h}, {w})"
    if not isinstance(latents, Tensor):
        raise TypeError(f"latents are a tensor {shape}; got {type(latents).__name__}.")
    fits = latents.ndim == 4 and latents.shape[1] == channels and (size is None or tuple(latents.shape[2:]) == size)
    if not fits or not latents.is_floating_point() or not latents.numel():
        raise ValueError(f"latents are {shape}, floats; got {tuple(latents.shape)}, {latents.dtype}.")
    if any(side % multiple for side in latents.shape[2:]):
        raise ValueError(f"latents are {shape} with H and W multiples of {multiple}; got {tuple(latents.shape)}.")
    if not bool(latents.isfinite().all()):
        raise ValueError("latents have NaN or infinite values; they are standard normal noise.")


def check_output_type(output_type: Any, allowed: Sequence[str] = OUTPUT_TYPES) -> None:
    """Raise ValueError unless samples can be returned as `output_type`."""
    if output_type not in allowed:
        *most, last = (repr(name) for name in allowed)
        raise ValueError(f"output_type is {', '.join(most)} or {last}; got {output_type!r}.")


def pack_images(samples: Tensor, output_type: str) -> Any:
    """Samples in [-1, 1] as `pil` images, `np` (B, H, W, C) or `pt` (B, C, H, W) in [0, 1]; `latent` as they are."""
    if output_type == "latent":
        return samples
    images = (samples / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return images
    array = images.cpu().permute(0, 2, 3, 1).float().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array


# The sampler


def check_process(scheduler: Any) -> None:
    """Refuse a scheduler that was made from the config of one of another noise process.

    diffusers' `from_config` leaves out what a class does not know; what is left out stays in the config.

    Raises:
        ValueError: For a scheduler of diffusion with a flow's config, or the other way round, and for one that does
            not know the flow's path.
    """
    config, names = scheduler.config, [cls.__name__ for cls in type(scheduler).__mro__]
    if config.get("use_flow_sigmas"):
        return
    own = type(scheduler).__name__
    if any(name.startswith("FlowMatch") for name in names):
        knows = set(names) & {"FlowMatchODEScheduler", "FlowMatchSDEScheduler"}
        if "beta_schedule" in config or config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(_OTHER.format(own, "a diffusion process", "one of that process"))
        if not knows and config.get("path", "linear") != "linear":
            raise ValueError(_OTHER.format(own, f"the path {config['path']!r}, which it does not know", "ours"))
    elif config.get("prediction_type") == "flow_prediction" or "base_image_seq_len" in config:
        raise ValueError(_OTHER.format(own, "a flow", "FlowMatchODEScheduler"))


_OTHER = "This {} was made from the config of {}: it would step along another process than the network knows. Take {}."


def set_timesteps(scheduler: Any, steps: Any, device: Any, tokens: int | None = None) -> int:
    """Set the steps of a sampler, those of a dynamic shift too.

    Args:
        scheduler: Any.
        steps: Number of them.
        device: Of its timesteps.
        tokens: Of an image, which a dynamic shift depends on.

    Returns:
        Number of network calls.

    Raises:
        TypeError: For what is no whole number.
        ValueError: For fewer steps than one, the config of another process, and a dynamic shift without tokens.
    """
    check_whole("num_inference_steps", steps)
    check_process(scheduler)
    options = {}
    if scheduler.config.get("use_dynamic_shifting") and "mu" in inspect.signature(scheduler.set_timesteps).parameters:
        if tokens is None:
            raise ValueError(
                f"use_dynamic_shifting of this {type(scheduler).__name__} goes by the number of image tokens, and "
                "this network has none. Make it with use_dynamic_shifting=False and a shift."
            )
        options["mu"] = dynamic_mu(scheduler.config, tokens)
    scheduler.set_timesteps(steps, device=device, **options)
    return len(scheduler.timesteps)


def dynamic_mu(config: Mapping[str, Any], tokens: int) -> float:
    """`mu` of a dynamic shift: on the line from `base_shift` at `base_image_seq_len` tokens to `max_shift`.

    Example:
        >>> scheduler = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
        >>> dynamic_mu(scheduler, 4096)
        1.15
    """
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    low, high, first, last = (check_number(name, config.get(name)) for name in names)
    part = (tokens - first) / (last - first)
    return (1 - part) * low + part * high


def accepted_arguments(scheduler: Any) -> set[str]:
    """Names of what a scheduler's `step` takes."""
    return set(inspect.signature(scheduler.step).parameters)


def step_arguments(
    scheduler: Any, generator: Any, eta: Any = 0.0, use_clipped_model_output: bool | None = None
) -> dict[str, Any]:
    """What the sampler's `step` takes besides the prediction.

    Raises:
        TypeError: For an `eta` that is no number.
        ValueError: For an `eta` outside of [0, 1], and settings that this scheduler does not act on.
    """
    accepted = accepted_arguments(scheduler)
    eta = check_number("eta", eta, 0, 1)
    given = {"eta": eta or None, "use_clipped_model_output": use_clipped_model_output}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in accepted:
            raise ValueError(f"{type(scheduler).__name__} does not take {name}, got {value}; leave it out.")
    return given | ({"generator": generator} if "generator" in accepted else {})


def without_variance(scheduler: Any, output: Tensor, channels: int) -> Tensor:
    """A network's output as the sampler steps with it: a learned variance is cut off where the sampler reads none."""
    # Only this scheduler reads one, and only where its config says so.
    learned = str(scheduler.config.get("variance_type", "")).startswith("learned")
    return output if learned and isinstance(scheduler, DDPMScheduler) else output[:, :channels]


# Callbacks


def callback_names(callback: Any, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of the tensors that a callback gets: those it asks for itself, as diffusers' own do, or `names`.

    Raises:
        TypeError: For what cannot be called.
        ValueError: For a tensor that there is not.
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end is called after each step; got {callback!r}.")
    names = list(getattr(callback, "tensor_inputs", names))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"Callbacks get tensors of {list(known)}; asked for {unknown}.")
    return names


def call_back(
    callback: Callable[..., dict[str, Any] | None] | None,
    pipe: Any,
    step: int,
    timestep: Tensor,
    tensors: dict[str, Any],
    names: Sequence[str],
) -> dict[str, Any]:
    """The tensors after a callback: what it returns by name takes the place of what was there.

    Raises:
        ValueError: If it returns a tensor that there is not.
    """
    if callback is None:
        return tensors
    returned = callback(pipe, step, timestep, {name: tensors[name] for name in names}) or {}
    unknown = [name for name in returned if name not in tensors]
    if unknown:
        raise ValueError(f"A callback may return tensors of {list(tensors)}; it returned {unknown}.")
    return tensors | returned


__all__ = [
    "OUTPUT_TYPES",
    "SamplingMixin",
    "accepted_arguments",
    "call_back",
    "callback_names",
    "check_generator",
    "check_latents",
    "check_number",
    "check_output_type",
    "check_process",
    "count_samples",
    "dynamic_mu",
    "pack_images",
    "repeat_rows",
    "set_timesteps",
    "step_arguments",
    "without_variance",
]
