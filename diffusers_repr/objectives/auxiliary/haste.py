"""HASTE (arXiv 2505.16792): attention of the network drawn to the teacher's, and an early end of all alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.encoders import AttentionEncoder
from diffusers_repr.objectives.auxiliary.base import AuxiliaryLoss, LossHost, Observation, full_precision, widen

PAIRS = 4
LAST_BLOCK = 7  # from 0: the paper's code takes 4 to 7, whatever the depth of the network and of the alignment


def attention_alignment_loss(query: Tensor, key: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy `-sum_m target log softmax(q k^T / sqrt(d))`, averaged over samples, heads and rows.

    Least, the mean entropy of the target, where both are equal.

    Args:
        query: `(B, heads, N, d)`.
        key: `(B, heads, N, d)`.
        target: `(B, heads', N, N)`, rows add up to 1; as many heads as both have are compared, from the first.

    Raises:
        ValueError: If the numbers of tokens differ.
    """
    if target.shape[-2:] != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"The network attends over {query.shape[2]} tokens, the teacher over {target.shape[-1]}; attention can "
            "only be aligned on equal grids. Choose match_grid='resize_image', or a teacher of that grid."
        )
    heads = min(query.shape[1], target.shape[1])
    with full_precision(query.device):
        query, key, target = (widen(part[:, :heads]) for part in (query, key, target))
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return -(target * F.log_softmax(logits, dim=-1)).sum(-1).mean()


class AttentionAlignmentLoss(AuxiliaryLoss):
    """Attention alignment, averaged over pairs of layers; logits are made again in these layers alone.

    In HASTE both alignment losses have the weight 0.5, and both end together (after 250k steps for XL): give
    `stop_step` to its `AlignmentLoss` too. Its code pairs the blocks 4 to 7 (from 0) with the last four of DINOv2-B,
    whatever the depth and whichever block REPA aligns, and so it is here for networks of 8 blocks and more. Of a
    smaller one the blocks are those that end with REPA's, four or as many as there are; so are the teacher's, from its
    end.

    Args:
        encoder: Name of the teacher among the objective's encoders; the first if None. It must be a live one: a cache
            holds no attention.
        layers: Paths of self-attentions; by the rule above if None.
        teacher_layers: Blocks of the teacher, one for each; the last ones if None.
        weight: Of the loss.
        stop_step: Optimizer steps after which it ends.
    """

    reads_pixels = True

    def __init__(
        self,
        encoder: str | None = None,
        layers: Sequence[str] | None = None,
        teacher_layers: Sequence[int] | None = None,
        weight: float = 0.5,
        stop_step: int | None = None,
    ) -> None:
        super().__init__("attention", weight, stop_step)
        self.encoder, self.chosen, self.teacher_chosen = encoder, layers, teacher_layers
        self.teacher_layers: tuple[int, ...] = ()

    def attach(self, host: LossHost) -> None:
        """Find the teacher and the layers.

        Raises:
            ValueError: If there is no such teacher, or layers do not pair.
        """
        self.encoder = self.encoder or next(iter(host.encoders), None)
        teacher = host.encoders.get(self.encoder or "")
        if teacher is None:
            known = list(host.encoders) or "none"
            raise ValueError(f"Attention alignment needs a teacher; no encoder {self.encoder!r} among {known}.")
        if not isinstance(teacher, AttentionEncoder):
            raise ValueError(f"The teacher {self.encoder!r} gives no attention; a network must be loaded.")
        paths, blocks = self.chosen, self.teacher_chosen
        if paths is None:
            most = min(PAIRS, teacher.num_blocks or PAIRS) if blocks is None else len(blocks)
            paths = default_attentions(host, most, exactly=blocks is not None)
        blocks = tuple(range(-len(paths), 0)) if blocks is None else tuple(blocks)
        if len(paths) != len(blocks):
            raise ValueError(
                f"{len(paths)} layers {list(paths)} and {len(blocks)} teacher_layers {list(blocks)}: one of the "
                "teacher's for each is needed."
            )
        there = teacher.num_blocks
        outside = [at for at in blocks if there and not -there <= at < there]
        if there and outside:
            raise ValueError(
                f"teacher_layers {outside} are no blocks of the teacher {self.encoder!r}: it has {there}, from 0 to "
                f"{there - 1} or from {-there} to -1."
            )
        assert self.encoder is not None
        self.teacher_layers, self.teacher_attentions = blocks, {self.encoder: blocks}
        self.attentions = tuple(paths)

    def forward(self, seen: Observation) -> Tensor:
        """Mean over the pairs."""
        assert self.encoder is not None
        targets = seen.teachers.attention(self.encoder)
        losses = [
            attention_alignment_loss(*seen.attention[path], target)
            for path, target in zip(self.attentions, targets, strict=True)
        ]
        return torch.stack(losses).mean()

    def describe(self) -> dict[str, Any]:
        """With the teacher and its layers."""
        return {**super().describe(), "encoder": self.encoder, "teacher_layers": list(self.teacher_layers)}


def default_attentions(host: LossHost, most: int, exactly: bool) -> list[str]:
    """Paths of the self-attentions that HASTE reads by default, see `AttentionAlignmentLoss`.

    Args:
        host: Its network, and the block that it aligns.
        most: How many at most.
        exactly: Refuse fewer.

    Raises:
        ValueError: If the network has fewer blocks up to the last.
    """
    model, denoiser = host.network, host.denoiser
    blocks, last = denoiser.family.stack(model), LAST_BLOCK
    if len(blocks) <= LAST_BLOCK:
        alignment = dict(host.losses.items()).get("alignment")
        # One that comes later in the list is attached later, and tells only the layer that it was given.
        aligned = next(iter(getattr(alignment, "layers", ())), getattr(alignment, "chosen", None) or "")
        (default,) = denoiser.default_layers("repa").layers
        last = blocks.index(next((block for block in blocks if f"{aligned}.".startswith(f"{block}.")), default))
    count = min(most, last + 1)
    if exactly and count < most:
        raise ValueError(
            f"{most} teacher_layers, and {count} blocks up to {blocks[last]}; name as many `layers` as teacher_layers."
        )
    attentions = denoiser.family.self_attentions(model)
    return [_attention_of(model, block, attentions) for block in blocks[last - count + 1 : last + 1]]


def _attention_of(model: Any, block: str, attentions: Sequence[str]) -> str:
    for path in attentions:
        if path.startswith(f"{block}."):
            return path
    raise ValueError(
        f"Block {block!r} ({type(model.get_submodule(block)).__name__}) has no self-attention that is known; name the "
        "layers. `attention_layers(model)` lists them."
    )


__all__ = ["AttentionAlignmentLoss", "attention_alignment_loss"]
