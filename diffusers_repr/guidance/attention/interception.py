"""An attention module's own forward with its softmax replaced: for layouts whose processors are not spelled out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffusers_repr.capture.hidden_softmax import softmax_remedy
from diffusers_repr.denoiser.attention_layouts import AttentionLayout
from diffusers_repr.guidance.attention.projections import Projections, split_tokens

Attend = Callable[[Projections], Tensor]

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def intercepted(
    module: nn.Module,
    layout: AttentionLayout,
    arguments: Mapping[str, Any],
    attend: Attend,
    image: slice | Tensor | None = None,
) -> Any:
    """The output of an attention module whose one call of `scaled_dot_product_attention` is replaced.

    Its norms, rotations and projections are its own, whatever they are, in the layout and the masks that it makes.

    Args:
        module: An attention module that calls `scaled_dot_product_attention` once, on all its tokens.
        layout: Where its text lies.
        arguments: The call's arguments by name; the image's tokens are `hidden_states`, or else the first of them.
        attend: From what goes into the weighted sum to the sum `(B, heads, S, D)`.
        image: Of a single stream: where the image tokens lie in it, a slice, or places `(B, N)` by row.

    Returns:
        As the module's own forward.

    Raises:
        ValueError: If it makes no such call, or more than one, or its tokens are not those of the layout.
    """
    hidden = arguments.get("hidden_states", next(iter(arguments.values())))
    own = math.prod(hidden.shape[2:]) if hidden.ndim == 4 else hidden.shape[1]
    text = None if layout.text_input is None else arguments.get(layout.text_input)
    expected = own if text is None else own + text.shape[1]

    def replace(call: Mapping[str, Any]) -> Tensor:
        queries, keys = call["query"].shape[2], call["key"].shape[2]
        if (queries, keys) != (expected, expected):
            raise ValueError(
                f"A {type(module).__name__} attends from {queries} queries to {keys} keys, and {layout.name} has "
                f"{expected} of both here. Where its text stands is told in the `attentions` of its family "
                "(docs/adding_a_family.md)."
            )
        calls, order = _projections(layout, call, own, image)
        attended = attend(calls).to(call["query"].dtype)
        return attended if order is None else torch.zeros_like(attended).scatter(2, _wide(order, attended), attended)

    # The function mode sees calls of `scaled_dot_product_attention` by torch's protocol for overriding functions
    # (`__torch_function__`, in this thread alone); a backend that computes attention by itself is not seen, and told.
    watch = _Replacement(replace)
    with watch:
        output = module.forward(**arguments)  # not the module: the hooks of the lanes are on it
    if watch.calls != 1:
        name = type(getattr(module, "processor", None)).__name__
        raise ValueError(
            f"A {type(module).__name__} with {name} made {watch.calls} calls of scaled_dot_product_attention in a "
            f"forward; one can be perturbed.{'' if watch.calls else softmax_remedy(module)}"
        )
    return output


class _Replacement(TorchFunctionMode):
    def __init__(self, replace: Callable[[Mapping[str, Any]], Tensor]) -> None:
        super().__init__()
        self.replace, self.calls = replace, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.replace({**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})})


def _projections(
    layout: AttentionLayout, call: Mapping[str, Any], own: int, image: slice | Tensor | None
) -> tuple[Projections, Tensor | None]:
    """What goes into the sum; if the image is no end of the sequence, with its tokens moved there; and that order."""
    query, key, value = (call[name] for name in ("query", "key", "value"))
    if key.shape[1] != query.shape[1]:  # grouped queries
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    tokens = query.shape[2]
    scale = 1 / math.sqrt(query.shape[-1]) if call.get("scale") is None else call["scale"]
    mask = _additive(call.get("attn_mask"), query)
    if call.get("is_causal"):
        raise ValueError("Causal attention among image tokens cannot be perturbed.")
    if layout.single and image is None:
        raise ValueError(f"{layout.name} holds text and image in one input; which are the image's must be told.")
    if isinstance(image, slice) and layout.single and image.start > 0 and image.stop < tokens:
        image = torch.arange(image.start, image.stop, device=query.device).expand(query.shape[0], -1)
    if not isinstance(image, Tensor):
        where, rest = split_tokens(layout, tokens, own, image)
        return Projections(query, key, value, where, rest, scale, mask), None
    image = image.to(query.device)
    taken = torch.zeros(query.shape[0], tokens, dtype=torch.int8, device=query.device).scatter(1, image, 1)
    others = taken.argsort(dim=1, stable=True)[:, : tokens - image.shape[1]]
    order = torch.cat([others, image], dim=1)
    query, key, value = (part.gather(2, _wide(order, part)) for part in (query, key, value))
    first = slice(0, others.shape[1])
    return Projections(query, key, value, slice(first.stop, tokens), first, scale, _moved(mask, order)), order


def _wide(order: Tensor, like: Tensor) -> Tensor:
    return order[:, None, :, None].expand_as(like)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask of four dimensions that is added to the scores."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)


def _moved(mask: Tensor | None, order: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = mask.expand(order.shape[0], -1, -1, -1)
    mask = mask.gather(3, order[:, None, None, :].expand(-1, *mask.shape[1:3], -1))
    if mask.shape[2] > 1:
        mask = mask.gather(2, order[:, None, :, None].expand_as(mask))
    return mask


__all__ = ["intercepted"]
