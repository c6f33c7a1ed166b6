"""Network inputs of a condition: through the pipeline's own call, from ready embeddings, by rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.condition import Condition, first_call, forward_names
from diffusers_repr.denoiser.family import Family

Cache = MutableMapping[Any, dict[str, Any]]


class Conditioned(Protocol):
    """What a condition is made of: a network, its family and the pipeline that encodes for it. A `Denoiser` is one."""

    model: nn.Module
    pipe: Any
    family: Family
    prompts: Cache | None

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The network's."""
        ...


def from_embeddings(
    denoiser: Conditioned, embeddings: Mapping[str, Any], batch: int | None, size: tuple[int, ...] | None
) -> Condition:
    """Ready inputs, by the network's names or, through the pipeline's call, by the pipeline's."""
    names = forward_names(denoiser.model)
    unknown = [name for name in embeddings if name not in names]
    if unknown and denoiser.pipe is not None:
        embeddings = pipeline_inputs(denoiser, dict(embeddings), size)
    elif unknown and not _takes_any(denoiser):
        raise ValueError(
            f"{type(denoiser.model).__name__} takes no input {unknown[0]!r}. It takes: {', '.join(names[1:])}."
        )
    else:
        embeddings = denoiser.family.condition_rows(embeddings)
    placed = {name: to_device(value, denoiser.device) for name, value in embeddings.items()}
    return rows_of(denoiser, placed, batch, "rows of embeddings")


def _takes_any(denoiser: Conditioned) -> bool:
    parameters = inspect.signature(type(denoiser.model).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor in a value, a nested dict or a tuple on a device."""
    if type(value) is tuple:
        return tuple(to_device(part, device) for part in value)
    if isinstance(value, Mapping):
        return {name: to_device(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def rows_of(denoiser: Conditioned, inputs: Mapping[str, Any], batch: int | None, what: str) -> Condition:
    """A condition of inputs that have one row, or one per sample."""
    unbatched = denoiser.family.unbatched
    rows = max((_rows(name, value, unbatched) for name, value in inputs.items()), default=1)
    count = count_of(rows, batch, what)
    index = torch.arange(count) if rows == count else torch.zeros(count, dtype=torch.long)
    return Condition(dict(inputs), rows, index, unbatched)


def _rows(name: str, value: Any, unbatched: tuple[str, ...]) -> int:
    if isinstance(value, Mapping):
        return max((_rows(key, part, unbatched) for key, part in value.items()), default=1)
    return value.shape[0] if isinstance(value, Tensor) and value.ndim and name not in unbatched else 1


def count_of(given: int, batch: int | None, what: str) -> int:
    """Number of samples, from rows that are given: one for all, or one a sample.

    Raises:
        ValueError: For another number of them.
    """
    if batch is None:
        batch = given
    if given not in (1, batch) or not given:
        raise ValueError(f"{given} {what} for {batch} images; pass 1 or {batch}.")
    return batch


def pipeline_inputs(denoiser: Conditioned, call: Mapping[str, Any], size: tuple[int, ...] | None) -> dict[str, Any]:
    """What the pipeline of a denoiser gives its network in a call with these arguments.

    Raises:
        ValueError: If the pipeline gives more rows than it was asked for: it guides by itself, and the rows of the
            null condition are among them.
    """
    accepted = inspect.signature(type(denoiser.pipe).__call__).parameters
    arguments = {k: v for k, v in denoiser.family.pipeline_arguments.items() if k in accepted}
    if size is not None:
        names = ("num_frames", "height", "width")[-len(size) :]
        arguments |= {name: side for name, side in zip(names, size, strict=True) if name in accepted}
    inputs, rows = first_call(denoiser.pipe, denoiser.model, {**arguments, **call})
    asked = _asked(call)
    if asked is not None and rows > asked:
        scales = {k: p.default for k, p in accepted.items() if k.endswith(("guidance_scale", "cfg_scale"))}
        held = ", ".join(f"{name}={value!r}" for name, value in scales.items()) or "no scale of guidance"
        off = {name: 1.0 for name in scales} or "what switches its guidance off"
        raise ValueError(
            f"{type(denoiser.pipe).__name__} gives its {type(denoiser.model).__name__} {rows} rows for {asked} "
            f"prompt{'s' if asked > 1 else ''}: it guides by itself, and the null condition is among them. Its call "
            f"takes {held}; set `pipeline_arguments = {off}` in {type(denoiser.family).__name__} (see "
            "docs/adding_a_family.md), or pass them with the embeddings."
        )
    return denoiser.family.condition_rows(inputs)


def _asked(call: Mapping[str, Any]) -> int | None:
    """Rows that a call asks for by its prompts; None where it has none."""
    counts = [_length(value) for name, value in call.items() if name.removeprefix("pooled_").startswith("prompt")]
    return max(counts) * int(call.get("num_images_per_prompt") or 1) if counts else None


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim) else 1
