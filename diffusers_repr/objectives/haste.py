"""HASTE (arXiv 2505.16792): attention of the network drawn to the teacher's, and an early end of all alignment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.objectives.blocks import block_path, repa_depth
from diffusers_repr.objectives.terms import Step, Term, full_precision, widen

if TYPE_CHECKING:
    from diffusers_repr.objectives.repa import REPAObjective

ATTENTION_NAMES = ("attn", "attn1", "self_attn")


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


class AttentionAlignmentTerm(Term):
    """Attention alignment, averaged over pairs of layers; logits are made again in these layers alone.

    In HASTE both alignment losses have the weight 0.5, the blocks 4 to 7 (from 0) of SiT-XL are paired with the last
    four of DINOv2-B, and both losses end together (after 250k steps for XL): give `stop_step` to `REPAObjective` too.

    Args:
        encoder: Name of the teacher among the objective's encoders; the first if None. It must be a live one: a cache
            holds no attention.
        layers: Paths of self-attentions; those of the four blocks up to REPA's if None.
        teacher_layers: Blocks of the teacher, one for each.
        weight: Of the loss.
        stop_step: Optimizer steps after which it ends.
    """

    reads_pixels = True

    def __init__(
        self,
        encoder: str | None = None,
        layers: Sequence[str] | None = None,
        teacher_layers: Sequence[int] = (-4, -3, -2, -1),
        weight: float = 0.5,
        stop_step: int | None = None,
    ) -> None:
        super().__init__("attention", weight, stop_step)
        self.encoder, self.chosen, self.teacher_layers = encoder, layers, tuple(teacher_layers)

    def attach(self, objective: REPAObjective) -> None:
        """Find the teacher and the layers.

        Raises:
            ValueError: If there is no such teacher, or layers do not pair.
        """
        self.encoder = self.encoder or next(iter(objective.encoders), None)
        teacher = objective.encoders.get(self.encoder or "")
        if teacher is None:
            known = list(objective.encoders) or "none"
            raise ValueError(f"Attention alignment needs a teacher; no encoder {self.encoder!r} among {known}.")
        if not hasattr(teacher, "encode_with_attention"):
            raise ValueError(f"The teacher {self.encoder!r} gives no attention; a network must be loaded.")
        model = objective.network
        paths = self.chosen
        if paths is None:
            last = repa_depth(model)
            first = max(1, last - len(self.teacher_layers) + 1)
            paths = [_attention_of(model, block_path(model, number)) for number in range(first, last + 1)]
        if len(paths) != len(self.teacher_layers):
            raise ValueError(
                f"{len(paths)} layers {list(paths)} and {len(self.teacher_layers)} teacher_layers "
                f"{list(self.teacher_layers)}: one of the teacher's for each is needed."
            )
        self.attentions = tuple(paths)

    def forward(self, step: Step) -> Tensor:
        """Mean over the pairs."""
        assert self.encoder is not None
        targets = step.teachers.attention(self.encoder)
        losses = [
            attention_alignment_loss(*step.attention[path], target)
            for path, target in zip(self.attentions, targets, strict=True)
        ]
        return torch.stack(losses).mean()

    def describe(self) -> dict[str, Any]:
        """With the teacher and its layers."""
        return {**super().describe(), "encoder": self.encoder, "teacher_layers": list(self.teacher_layers)}


def _attention_of(model: Any, block: str) -> str:
    module = model.get_submodule(block)
    for name in ATTENTION_NAMES:
        if hasattr(module, name):
            return f"{block}.{name}"
    raise ValueError(
        f"Block {block!r} ({type(module).__name__}) has no self-attention named {' or '.join(ATTENTION_NAMES)}; name "
        "the layers. `attention_layers(model)` lists them."
    )


__all__ = ["AttentionAlignmentTerm", "attention_alignment_loss"]
