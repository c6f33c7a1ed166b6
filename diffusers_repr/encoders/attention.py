"""Attention probabilities of a vision transformer, recomputed from its queries and keys by hooks."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from diffusers_repr.denoiser.hooks import Hooks

# Queries, keys and the width of a head, as the attentions of transformers name them: 5 and most of 4, some of 4.
_NAMES = (("q_proj", "k_proj", "head_dim"), ("query", "key", "attention_head_size"))


@contextmanager
def recording_attention(model: nn.Module, blocks: Sequence[str], prefix: int) -> Iterator[list[Tensor]]:
    """Attention among the patch tokens of some blocks: what HASTE (arXiv 2505.16792) takes from its teacher.

    Fused attention keeps no probabilities, so they are recomputed: `softmax(q k^T / sqrt(d))` in float32 over the
    patch tokens alone. Up to rounding that is the network's own attention with the columns of class and register
    tokens left out and the rows normalised again. Memory is only used for the blocks asked for.

    Args:
        model: The network.
        blocks: Paths of its blocks; in each, one attention with projections of queries and keys.
        prefix: Tokens in front of the patches.

    Yields:
        A list that holds at the end, for each block that was run, `(B, heads, N, N)` float32, rows adding up to 1.

    Raises:
        TypeError: If a block has no such attention.
    """
    parts: dict[str, dict[str, Any]] = {path: {} for path in blocks}
    found: list[Tensor] = []
    with ExitStack() as stack:
        hooks = Hooks(stack)
        for path, kept in parts.items():
            attention, (query, key, width) = _attention_in(model.get_submodule(path), path)
            kept["module"], kept["width"] = attention, getattr(attention, width)
            hooks.before(attention, _keep_rotary(kept))
            for part, name in (("query", query), ("key", key)):
                hooks.after(getattr(attention, name), _keep(kept, part))
        yield found
    found += [_probabilities(parts[path], prefix) for path in blocks if "key" in parts[path]]


def _attention_in(block: nn.Module, path: str) -> tuple[nn.Module, tuple[str, str, str]]:
    """The block's attention, and how it names its parts."""
    found = [(part, names) for part in block.modules() for names in _NAMES if all(hasattr(part, n) for n in names)]
    if len(found) != 1:
        raise TypeError(
            f"Block {path!r} ({type(block).__name__}) has {len(found)} attentions with "
            f"{' or with '.join(', '.join(names) for names in _NAMES)}; one is needed to recompute its probabilities."
        )
    return found[0]


def _keep(kept: dict[str, Any], name: str) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        kept[name] = output

    return hook


def _keep_rotary(kept: dict[str, Any]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        kept["rotary"] = kwargs.get("position_embeddings")

    return hook


def _probabilities(kept: Mapping[str, Any], prefix: int) -> Tensor:
    attention = kept["module"]
    # (B, N, heads * d) => (B, heads, N, d)
    query, key = (kept[part].unflatten(-1, (-1, kept["width"])).transpose(1, 2) for part in ("query", "key"))
    if kept["rotary"] is not None:  # DINOv3 turns queries and keys after their projection
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        query, key = rotate(query, key, *kept["rotary"])
    query, key = query[:, :, prefix:].float(), key[:, :, prefix:].float()
    return (query @ key.transpose(-1, -2) * kept["width"] ** -0.5).softmax(-1)
