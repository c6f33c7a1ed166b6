"""How a Denoiser makes a `Condition`: from prompts, class labels or ready embeddings."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_repr.denoiser.condition import Condition, first_call, forward_names, merge_rows
from diffusers_repr.denoiser.family import Family

Cache = MutableMapping[Any, dict[str, Any]]
_PROMPTS_KEPT = 256  # encoded prompts that are kept between calls
_CACHES = threading.Lock()  # for changing them


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


def from_prompts(
    denoiser: Conditioned,
    prompt: str | Sequence[str] | None,
    negative: str | None,
    batch: int | None,
    size: tuple[int, ...] | None,
    cache: Cache,
) -> Condition:
    """One row a distinct prompt, made by the pipeline's own call; see `Denoiser.condition`."""
    if denoiser.pipe is None:
        raise ValueError(
            f"A bare {type(denoiser.model).__name__} has no text encoder: build the Denoiser with `from_pipe`, or "
            "pass embeddings={'encoder_hidden_states': ..., ...}."
        )
    prompts = _prompts("prompt", prompt)
    count = _count(len(prompts), batch, "prompts")
    distinct = list(dict.fromkeys(prompts))
    parts = [_encoded(denoiser, text, size, cache, null=False) for text in distinct]
    index = torch.tensor([distinct.index(text) for text in prompts]).expand(count)
    null = None
    if negative is not None:
        (text,) = _prompts("negative_prompt", negative)
        null = rows_of(denoiser, _encoded(denoiser, text, size, cache, null=True), count, "negative prompts")
    with _CACHES:
        for kept in (cache, denoiser.prompts):
            while kept is not None and len(kept) > _PROMPTS_KEPT:  # a data set of captions does not fill the memory
                kept.pop(next(iter(kept)))
    unbatched = denoiser.family.unbatched
    return Condition(merge_rows(parts, unbatched), len(parts), index, unbatched, null)


def _prompts(name: str, prompt: str | Sequence[str] | None) -> list[str]:
    prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
    if name == "negative_prompt" and len(prompts) != 1:
        raise TypeError(f"negative_prompt is one string for all images; got {len(prompts)}.")
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string, or one per image; got {text!r} ({type(text).__name__}).")
    return prompts


def _encoded(
    denoiser: Conditioned, text: str, size: tuple[int, ...] | None, cache: Cache, null: bool
) -> dict[str, Any]:
    family = denoiser.family
    # Of a model that was moved or cast since, the rows lie elsewhere or have another dtype.
    key = (text, size, null and family.has_null_call, denoiser.device, denoiser.dtype)
    kept = denoiser.prompts if denoiser.prompts is not None else cache
    found = cache.get(key) or kept.get(key)
    if not found:
        call = family.null_call(denoiser.pipe, text) if null else {"prompt": text}
        found = pipeline_inputs(denoiser, call, size)
    with _CACHES:
        kept[key] = cache[key] = found
    return found


def from_labels(
    denoiser: Conditioned, class_labels: int | Sequence[int] | Tensor | None, batch: int | None
) -> Condition:
    """Class ids, checked by the family."""
    labels = None
    if class_labels is not None:
        labels = _labels(class_labels)
        if not len(labels):
            raise ValueError("class_labels is empty; pass one id, or one per image.")
    inputs = denoiser.family.from_class_labels(labels)
    return rows_of(denoiser, {k: v.to(denoiser.device) for k, v in inputs.items()}, batch, "class_labels")


def _labels(class_labels: int | Sequence[int] | Tensor) -> Tensor:
    try:
        labels = torch.as_tensor(class_labels).reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"class_labels are whole numbers, one or one per image; got {class_labels!r}.") from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        if not labels.numel():
            return labels.long()
        raise TypeError(f"class_labels are whole numbers, one or one per image; got {class_labels!r}.")
    return labels.long()


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
    placed = {name: _to_device(value, denoiser.device) for name, value in embeddings.items()}
    return rows_of(denoiser, placed, batch, "rows of embeddings")


def _takes_any(denoiser: Conditioned) -> bool:
    parameters = inspect.signature(type(denoiser.model).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _to_device(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def rows_of(denoiser: Conditioned, inputs: Mapping[str, Any], batch: int | None, what: str) -> Condition:
    """A condition of inputs that have one row, or one per sample."""
    unbatched = denoiser.family.unbatched
    rows = max((_rows(name, value, unbatched) for name, value in inputs.items()), default=1)
    count = _count(rows, batch, what)
    index = torch.arange(count) if rows == count else torch.zeros(count, dtype=torch.long)
    return Condition(dict(inputs), rows, index, unbatched)


def _rows(name: str, value: Any, unbatched: tuple[str, ...]) -> int:
    if isinstance(value, Mapping):
        return max((_rows(key, part, unbatched) for key, part in value.items()), default=1)
    return value.shape[0] if isinstance(value, Tensor) and value.ndim and name not in unbatched else 1


def _count(given: int, batch: int | None, what: str) -> int:
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
