"""`CaptionConditioner`: texts, encoded by the pipeline's own call."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from diffusers_repr.denoiser.condition import Condition, merge_rows
from diffusers_repr.denoiser.conditioner.base import Conditioner
from diffusers_repr.denoiser.conditioner.inputs import Cache, Conditioned, count_of, pipeline_inputs, rows_of

_PROMPTS_KEPT = 256  # encoded prompts that are kept between calls
_CACHES = threading.Lock()  # for changing them


class CaptionConditioner(Conditioner):
    """Texts, a string a sample, by the pipeline's own call up to its first use of the network; null is the empty one.

    Args:
        column: Of a batch of training data.
    """

    kind = "captions"
    argument = "prompt"

    def __init__(self, column: str = "caption") -> None:
        self.column = column
        self._cache: Cache = {}

    def bound_to(self, denoiser: Conditioned) -> Self:
        """See `Conditioner`; what was encoded is of one model."""
        bound = super().bound_to(denoiser)
        bound._cache = {}
        return bound

    @property
    def has_null(self) -> bool:
        """See `Conditioner`."""
        return True

    @property
    def recorded(self) -> bool:
        """See `Conditioner`."""
        return False

    def from_batch(self, batch: Mapping[str, Any], count: int) -> list[str]:
        """The texts; empty ones for data without."""
        return list(batch.get(self.column) or [""] * count)

    def draw_dropped(self, values: Any, chance: float, generator: torch.Generator | None = None) -> Tensor:
        """See `Conditioner`; drawn at 0 too, so that a run's other draws do not depend on the chance."""
        return torch.rand(len(values), generator=generator) < chance

    def inputs(self, values: Any, dropped: Tensor | None = None) -> dict[str, Any]:
        """What the pipeline gives its network; a distinct text is encoded once."""
        if dropped is not None:
            values = ["" if gone else text for text, gone in zip(values, dropped.tolist(), strict=True)]
        return self.condition(values, cache=self._cache).kwargs()

    def null(self, count: int = 1) -> dict[str, Any]:
        """That of the empty text; see `condition` for one with a negative prompt."""
        return self.inputs([""] * count)

    def condition(
        self,
        values: str | Sequence[str] | None,
        batch: int | None = None,
        size: tuple[int, ...] | None = None,
        cache: Cache | None = None,
        negative: str | None = None,
    ) -> Condition:
        """One row a distinct text, and the null condition of a negative one; see `Denoiser.condition`."""
        denoiser, cache = self.denoiser, {} if cache is None else cache
        if denoiser.pipe is None:
            raise ValueError(
                f"A bare {self._network} has no text encoder: build the Denoiser with `from_pipe`, or "
                "pass embeddings={'encoder_hidden_states': ..., ...}."
            )
        prompts = _prompts("prompt", values)
        count = count_of(len(prompts), batch, "prompts")
        distinct = list(dict.fromkeys(prompts))
        parts = _all_encoded(denoiser, distinct, size, cache)
        index = torch.tensor([distinct.index(text) for text in prompts]).expand(count)
        null = None
        if negative is not None:
            (text,) = _prompts("negative_prompt", negative)
            null = rows_of(denoiser, _encoded(denoiser, text, size, cache, null=True), count, "negative prompts")
        with _CACHES:
            for kept in (cache, denoiser.prompts):
                while kept is not None and len(kept) > _PROMPTS_KEPT:  # a data set of captions does not fill memory
                    kept.pop(next(iter(kept)))
        unbatched = denoiser.family.unbatched
        return Condition(merge_rows(parts, unbatched), len(parts), index, unbatched, null)

    def _refusal(self, name: str) -> str:
        return f"{self._network} takes a prompt, not {name}."

    def check(self, values: Any) -> None:
        """See `Conditioner`."""
        _prompts("prompt", values)

    def check_batch(self, batch: Mapping[str, Any], chance: float) -> None:
        """There must be captions, unless all are dropped."""
        if self.column not in batch and chance < 1:
            raise ValueError(
                f"{self._network} is conditioned on text and the data have no captions; name a column "
                "of texts by caption_column, or set label_dropout to 1 to train on the empty prompt alone."
            )

    def preview(self, count: int) -> dict[str, Any]:
        """Empty prompts."""
        return {"prompt": [""] * count}


def _prompts(name: str, prompt: str | Sequence[str] | None) -> list[str]:
    prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
    if name == "negative_prompt" and len(prompts) != 1:
        raise TypeError(f"negative_prompt is one string for all images; got {len(prompts)}.")
    for text in prompts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string, or one per image; got {text!r} ({type(text).__name__}).")
    return prompts


def _all_encoded(
    denoiser: Conditioned, texts: Sequence[str], size: tuple[int, ...] | None, cache: Cache
) -> list[dict[str, Any]]:
    """The inputs of each text, those not kept yet by one call of the pipeline, if it encodes them together."""
    new = [text for text in texts if not _kept(denoiser, text, size, cache, null=False)]
    if denoiser.family.prompts_together and len(new) > 1:
        inputs = pipeline_inputs(denoiser, {"prompt": new}, size)
        rows = Condition(inputs, len(new), torch.arange(len(new)), denoiser.family.unbatched)
        found = {text: rows.take([at]) for at, text in enumerate(new)}
        for text, row in found.items():
            _keep(denoiser, text, size, cache, row, null=False)
    return [_encoded(denoiser, text, size, cache, null=False) for text in texts]


def _encoded(
    denoiser: Conditioned, text: str, size: tuple[int, ...] | None, cache: Cache, null: bool
) -> dict[str, Any]:
    family = denoiser.family
    found = _kept(denoiser, text, size, cache, null)
    if not found:
        call = family.null_call(denoiser.pipe, text) if null else {"prompt": text}
        found = pipeline_inputs(denoiser, call, size)
    _keep(denoiser, text, size, cache, found, null)
    return found


def _kept(denoiser: Conditioned, text: str, size: Any, cache: Cache, null: bool) -> dict[str, Any] | None:
    key = _key(denoiser, text, size, null)
    found = cache.get(key)
    return found or (None if denoiser.prompts is None else denoiser.prompts.get(key))


def _keep(denoiser: Conditioned, text: str, size: Any, cache: Cache, inputs: dict[str, Any], null: bool) -> None:
    key = _key(denoiser, text, size, null)
    with _CACHES:
        cache[key] = inputs
        if denoiser.prompts is not None:
            denoiser.prompts[key] = inputs


def _key(denoiser: Conditioned, text: str, size: Any, null: bool) -> tuple[Any, ...]:
    # Of a model that was moved or cast since, the rows lie elsewhere or have another dtype.
    return (text, size, null and denoiser.family.has_null_call, denoiser.device, denoiser.dtype)


__all__ = ["CaptionConditioner"]
