"""What attention maps will need, from the meta device: no weights are touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture.attention import AttentionTape, AttentionTokens, Heads, check_attention_layers, watching
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.condition import eval_mode
from diffusers_repr.denoiser.layers import on_meta


def attention_memory(
    denoiser: Denoiser,
    layers: str | Sequence[str],
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
    heads: Heads = "mean",
    keys: Sequence[int] | None = None,
) -> int:
    """Bytes of the float32 attention maps of layers, all held at once.

    Text models are counted with the text length of their pipeline's default. Working memory comes on top: about three
    times 64 MiB with the default chunks.

    Args:
        denoiser: Of any family.
        layers: As in `capture_attention`.
        image_size: Pixels, (H, W) or one side; the configured size if None.
        batch: Images (times ensemble members held at once).
        heads: `mean`, or None for all heads.
        keys: Columns that are kept, or None for all.

    Raises:
        ValueError: As `capture_attention`, for layers without a probability matrix.
    """
    tokens = attention_tokens(denoiser, layers, image_size)
    return sum(batch * t.bytes_of(keys) * (1 if heads == "mean" else t.heads) for t in tokens.values())


def attention_tokens(
    denoiser: Denoiser, layers: str | Sequence[str], image_size: int | tuple[int, int] | None = None
) -> dict[str, AttentionTokens]:
    """Rows, columns and heads of the layers' maps, from one forward on the meta device."""
    size = denoiser.image_size if image_size is None else image_size
    size = (size, size) if isinstance(size, int) else size
    denoiser.check_size(size)
    model = on_meta(denoiser.model)
    modules = check_attention_layers(model, layers)
    family, stride = denoiser.family, denoiser.stride
    x_t = torch.empty(1, family.channels(), size[0] // stride, size[1] // stride, device="meta")
    level = denoiser.level(sum(denoiser.schedule.timestep_range) / 2)
    inputs = family.inputs(x_t, level, family.example(1, "meta"))
    tape = AttentionTape(list(modules))

    def keep(path: str, tokens: AttentionTokens, call: dict[str, Any]) -> None:
        tape.tokens[path] = tokens
        tape._record(path, call["query"], None)

    with torch.no_grad(), eval_mode(model), watching(tape, model, modules, keep):
        model(**{k: v.to("meta") if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return {path: tape.tokens[path] for path in modules}
