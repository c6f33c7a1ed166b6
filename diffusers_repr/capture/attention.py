"""`capture_attention`: attention probabilities of named layers, recomputed in chunks from the very q and k used."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffusers_repr.capture.capture import Tape, Transform, recording, refuse_compiled
from diffusers_repr.capture.hidden_softmax import softmax_remedy
from diffusers_repr.capture.names import check_layers
from diffusers_repr.denoiser.family import Family
from diffusers_repr.denoiser.family_registry import family_of_or_base
from diffusers_repr.denoiser.hooks import Hooks

Heads = Literal["mean"] | None
Order = Literal["self", "cross", "image_text", "text_image", "unknown"]

GIB = 2**30
_SCRATCH = 2**24  # scores held at once by default: 64 MiB in float32
_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True)
class AttentionTokens:
    """What the rows (queries) and columns (keys) of one attention map are.

    Attributes:
        order: `self`: rows and columns are the layer's own tokens (in FLUX's single-stream blocks text, then image).
            `cross`: rows are image tokens, columns text tokens. `image_text` (SD3) and `text_image` (FLUX): rows and
            columns are both streams, one after the other, as the network's family tells. `unknown`: none of these.
        image: Tokens of the layer's first input.
        text: Tokens of its second input; 0 for self-attention.
        heads: Attention heads.
        queries: Rows.
        keys: Columns.
    """

    order: Order
    image: int
    text: int
    heads: int
    queries: int
    keys: int

    @property
    def bytes_per_map(self) -> int:
        """Of one head of one sample, in float32, with all columns."""
        return self.bytes_of(None)

    def bytes_of(self, keys: Sequence[int] | None) -> int:
        """Of one head of one sample, in float32, with these columns alone; None: all."""
        return 4 * self.queries * (self.keys if keys is None else len(keys))


Keep = Callable[[str, AttentionTokens, dict[str, Any]], None]


class AttentionTape(Tape):
    """What `capture_attention` recorded.

    Attributes:
        features: Layer path -> probabilities `(B, queries, keys)` float32, or `(B, heads, queries, keys)`.
        tokens: Layer path -> what rows and columns are.
    """

    def __init__(self, layers: Sequence[str], stop_early: bool = True) -> None:
        super().__init__(layers, stop_early)
        self.tokens: dict[str, AttentionTokens] = {}
        self._running: list[tuple[str, nn.Module, int, int]] = []

    def _begin(self) -> None:
        super()._begin()
        self._running = []


@contextmanager
def capture_attention(
    model: nn.Module,
    layers: str | Sequence[str],
    heads: Heads = "mean",
    chunk: int | None = None,
    transform: Transform | None = None,
    stop_early: bool = True,
    max_bytes: int = 4 * GIB,
    keys: Sequence[int] | None = None,
) -> Iterator[AttentionTape]:
    """Keep the attention probabilities of named layers while `model` runs inside the block.

    The queries, keys, mask and scale are those of the layer's own call of `scaled_dot_product_attention` (norms and
    rotary embeddings included); `softmax(q k^T scale + mask)` is computed beside it in float32. The model's own output
    is untouched.

    Args:
        model: Any diffusers network.
        layers: Exact full paths of attention modules; `attention_layers(model)` lists them.
        heads: `mean` averages over the heads; None keeps them.
        chunk: Query rows computed at once; about 64 MiB of scores if None. The map of all heads is never held with
            `heads="mean"`.
        transform: `(map, path) -> anything`, applied at once; only its result is kept.
        stop_early: Stop the forward, and leave the block, once every layer has been read.
        max_bytes: Refuse to hold more than this.
        keys: Columns to keep, such as the places of a word's tokens in the prompt; None keeps all. Probabilities are
            those among all keys, and the rest is never held.

    Yields:
        An `AttentionTape`; read `.features` and `.tokens` after the block.

    Raises:
        ValueError: Unknown layers, layers that are no attention, attention without one probability matrix, columns
            that there are none of.
        MemoryError: If the maps need more than `max_bytes`; tells how much.
        RuntimeError: A compiled model.

    Example:
        >>> from diffusers.models.attention_processor import Attention
        >>> net = nn.Sequential(Attention(8, heads=2, dim_head=4))
        >>> with capture_attention(net, "0") as tape:
        ...     _ = net(torch.ones(1, 5, 8))
        >>> tape["0"].shape, tape.tokens["0"].order
        (torch.Size([1, 5, 5]), 'self')
    """
    refuse_compiled(model)
    if heads not in ("mean", None):
        raise ValueError(f"heads={heads!r}; expected 'mean' or None (all heads).")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ValueError(f"chunk must be a whole number of query rows from 1, or None; got {chunk!r}.")
    check_keys(keys)
    modules = check_attention_layers(model, layers)
    tape = AttentionTape(list(modules), stop_early)
    held: dict[str, int] = {}

    def keep(path: str, tokens: AttentionTokens, call: dict[str, Any]) -> None:
        batch = call["query"].shape[0]
        count = batch * (1 if heads == "mean" else tokens.heads)
        if keys is not None and max(keys) >= tokens.keys:
            raise ValueError(f"keys={list(keys)}, but {path!r} has {tokens.keys} columns: {tokens}.")
        total = sum(held.values()) + count * tokens.bytes_of(keys)
        if total > max_bytes:
            raise MemoryError(too_much(total, max_bytes, path, heads, keys, "reduce each map with transform="))
        probabilities = attention_probabilities(call, heads, chunk, keys)
        tape.tokens[path] = tokens
        kept = probabilities if transform is None else transform(probabilities, path)
        held[path] = kept.nbytes if isinstance(kept, Tensor) else 0
        tape._record(path, kept, None)

    with watching(tape, model, modules, keep) as hooks:
        hooks.before(model, lambda module, args, kwargs: held.clear())
        yield tape


@contextmanager
def watching(tape: AttentionTape, model: nn.Module, modules: Mapping[str, nn.Module], keep: Keep) -> Iterator[Hooks]:
    """Call `keep(path, tokens, arguments)` whenever a named layer calls `scaled_dot_product_attention`.

    Yields:
        What sets hooks until the end of the block.
    """

    def before(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own = args[0] if args else kwargs["hidden_states"]
            other = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            tape._running.append((path, module, _token_count(own), _token_count(other)))

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            tape._running.pop()
            if path not in tape.features:
                linear = "Linear" in _processor(module)
                why = " Linear attention has no probabilities." if linear else softmax_remedy(module)
                raise ValueError(
                    f"Layer {path!r} ({type(module).__name__} with {_processor(module)}) made no call of "
                    f"scaled_dot_product_attention.{why}"
                )

        return hook

    family = family_of_or_base(model)
    with recording(tape, model) as hooks:
        for path, module in modules.items():
            hooks.before(module, before(path))
            hooks.after(module, after(path))
        with _AttentionCalls(tape, family, keep):
            yield hooks


class _AttentionCalls(TorchFunctionMode):
    """Sees every call of `scaled_dot_product_attention`; those of a running named layer are kept."""

    def __init__(self, tape: AttentionTape, family: Family, keep: Keep) -> None:
        super().__init__()
        self.tape, self.family, self.keep = tape, family, keep

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and self.tape._running:
            path, module, own, other = self.tape._running[-1]
            if path in self.tape.features:
                raise ValueError(
                    f"Layer {path!r} ({type(module).__name__} with {_processor(module)}) made more than one call of "
                    "scaled_dot_product_attention in a forward; which map is meant is not clear."
                )
            call = {**dict(zip(_SDPA_ARGUMENTS, args, strict=False)), **kwargs}
            self.keep(path, _tokens(self.family, path, own, other, call), call)
        return func(*args, **kwargs)


def attention_layers(model: nn.Module) -> list[str]:
    """Paths of the attention modules, in module order (not that of execution)."""
    return [path for path, module in model.named_modules() if path and is_attention(module)]


def check_attention_layers(model: nn.Module, layers: str | Sequence[str]) -> dict[str, nn.Module]:
    """Attention modules at exact paths, in the order given.

    Raises:
        TypeError: For an index or anything else that is no path.
        ValueError: As `check_layers`, and for a layer that is no attention; names those inside or close to it.
    """
    modules = check_layers(model, layers)
    for path, module in modules.items():
        if not is_attention(module):
            known = attention_layers(model)
            near = [name for name in known if name.startswith(f"{path}.")][:3]
            near = near or difflib.get_close_matches(path, known, n=3, cutoff=0.3) or known[:3]
            raise ValueError(
                f"Layer {path!r} is a {type(module).__name__}, no attention. Closest: {near or 'none in this model'}. "
                "`attention_layers(model)` lists them."
            )
    return modules


def check_keys(keys: Sequence[int] | None) -> None:
    """Raise for columns that are none, or told twice.

    Raises:
        TypeError: For what is no sequence of whole numbers.
        ValueError: For none, negative ones and repeated ones.
    """
    if keys is None:
        return
    whole = isinstance(keys, Sequence) and not isinstance(keys, str | bytes)
    if not whole or not all(isinstance(key, int) and not isinstance(key, bool) for key in keys):
        raise TypeError(f"keys are columns of the map, whole numbers such as [5]; got {keys!r}.")
    if not keys or min(keys) < 0 or len(set(keys)) < len(keys):
        raise ValueError(f"keys are columns of the map from 0, each once; got {list(keys)}.")


def attention_probabilities(
    call: dict[str, Any], heads: Heads = "mean", chunk: int | None = None, keys: Sequence[int] | None = None
) -> Tensor:
    """`softmax(q k^T scale + mask)` of one call of `scaled_dot_product_attention`, in float32 or wider.

    Args:
        call: Its arguments by name; `query` is `(B, H, N, D)`, `key` `(B, H, M, D)`.
        heads: `mean` or None.
        chunk: Query rows at once.
        keys: Columns that are kept, of the probabilities among all; None: all.

    Returns:
        `(B, N, M)`, or `(B, H, N, M)` with `heads=None`; M of the kept. Rows that the mask leaves nothing to are 0.

    Example:
        >>> q = torch.zeros(1, 2, 3, 4)
        >>> attention_probabilities({"query": q, "key": torch.zeros(1, 2, 2, 4)})[0, 0]
        tensor([0.5000, 0.5000])
    """
    query, key, mask = call["query"], call["key"], call.get("attn_mask")
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, count, rows, width = query.shape
    if key.shape[1] != count:  # grouped queries
        key = key.repeat_interleave(count // key.shape[1], dim=1)
    key, columns = key.to(wide), key.shape[2]
    scale = call.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else scale
    step = chunk or max(1, _SCRATCH // (batch * count * columns))
    kept = slice(None) if keys is None else torch.tensor(keys, device=query.device)
    width_out = columns if keys is None else len(keys)
    shape = (batch, rows, width_out) if heads == "mean" else (batch, count, rows, width_out)
    out = torch.empty(shape, dtype=wide, device=query.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        scores = query[:, :, start:stop].to(wide) @ key.transpose(-1, -2) * scale
        bias = _mask_rows(mask, start, stop, rows)
        if call.get("is_causal"):
            row = torch.arange(start, stop, device=query.device)[:, None]
            bias = row >= torch.arange(columns, device=query.device)
        if bias is not None:
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias.to(wide)
        part = scores.softmax(-1)
        if bias is not None:
            part = part.masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
        part = part[..., kept]
        out[..., start:stop, :] = part.mean(1) if heads == "mean" else part
    return out


def too_much(total: int, limit: int, where: str, heads: Heads, keys: Sequence[int] | None, *more: str) -> str:
    """The sentence for maps that need more memory than allowed, with what would lower it.

    Args:
        total: Bytes that are needed.
        limit: Bytes that are allowed.
        where: Path of the last layer that is counted.
        heads: As asked for.
        keys: As asked for.
        *more: What else the caller may do.
    """
    ways = ["take fewer or smaller images, or fewer layers", *(["heads='mean'"] if heads is None else [])]
    ways += [*(["some columns alone by keys="] if keys is None else []), *more]
    return (
        f"Attention maps need {total / GIB:.3g} GiB up to {where!r}; max_bytes allows {limit / GIB:.3g} GiB. To need "
        f"less, {', '.join(ways)}; or raise max_bytes."
    )


def _mask_rows(mask: Tensor | None, start: int, stop: int, rows: int) -> Tensor | None:
    if mask is None or mask.ndim < 2 or mask.shape[-2] != rows:
        return mask
    return mask[..., start:stop, :]


def is_attention(module: nn.Module) -> bool:
    """Whether a module is built as diffusers' attention modules are."""
    return hasattr(module, "to_q") or hasattr(module, "to_qkv")


def _processor(module: nn.Module) -> str:
    return type(getattr(module, "processor", None)).__name__


def _token_count(value: Any) -> int:
    if not isinstance(value, Tensor):
        return 0
    return math.prod(value.shape[2:]) if value.ndim == 4 else value.shape[1]


def _tokens(family: Family, path: str, own: int, other: int, call: dict[str, Any]) -> AttentionTokens:
    heads, queries, keys = call["query"].shape[1], call["query"].shape[2], call["key"].shape[2]
    order: Order = "unknown"
    if other == 0 and queries == keys == own:
        order = "self"
    elif other and (queries, keys) == (own, other):
        order = "cross"
    elif other and queries == keys == own + other:
        layout = family.fixed_layout(path)
        if layout is not None and layout.text is not None:
            order = "text_image" if layout.text == "first" else "image_text"
    return AttentionTokens(order, own, other, heads, queries, keys)
