"""Which words fit a mask: pooled masks, cosines with texts, and the ensemble with another classifier."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import CastLayerNorm, CastLinear

_MOST_SCALE = 100.0  # as CLIP's


def pool_masks(features: Tensor, masks: Tensor) -> Tensor:
    """The mean of features where a mask is more probable than not; no gradient passes to the masks.

    Args:
        features: `(B, C, h, w)`.
        masks: Logits `(B, Q, h, w)`.

    Returns:
        `(B, Q, C)`; 0 for an empty mask.

    Example:
        >>> pool_masks(torch.tensor([[[[1.0, 3.0, 9.0]]]]), torch.tensor([[[[2.0, 5.0, -1.0]], [[-1.0, -1.0, -1.0]]]]))
        tensor([[[2.],
                 [0.]]])
    """
    inside = (masks.detach().sigmoid() > 0.5).to(features.dtype)
    share = inside / (inside.sum(dim=(2, 3), keepdim=True) + 1e-8)
    return torch.einsum("bchw,bqhw->bqc", features, share)


def merge_synonyms(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """Logits `(..., N)` of names to those of their classes, `(..., K)`: the largest of each class.

    Args:
        logits: One a name, class after class.
        counts: Names of each class.

    Raises:
        ValueError: If they are not N in all.
    """
    if sum(counts) != logits.shape[-1]:
        raise ValueError(f"{len(counts)} classes have {sum(counts)} names; there are {logits.shape[-1]} logits.")
    return torch.stack([part.amax(dim=-1) for part in logits.split(list(counts), dim=-1)], dim=-1)


def cosine_logits(vectors: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """`scale` times the cosine of each vector `(..., D)` with each text `(N, D)`: `(..., N)`."""
    return scale * functional.normalize(vectors, dim=-1) @ functional.normalize(texts, dim=-1).T


def geometric_ensemble(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """`first^(1-w) second^w`, brought to a sum of 1 (ODISE, arXiv 2303.04803, eq. 7).

    Args:
        first: Probabilities `(..., K)`.
        second: Likewise, of another classifier.
        weights: `(K,)` in [0, 1], of the second for each class.

    Returns:
        `(..., K)`. A factor of weight 0 counts for nothing, also where its probability is 0. Where no class is left
        with a probability above 0, all are equal.

    Example:
        >>> one, two = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.2, 0.0, 0.8])
        >>> geometric_ensemble(one, two, torch.tensor([0.5, 0.0, 0.0])).tolist()
        [0.0, 0.5, 0.5]
    """
    logs = [torch.where(w > 0, w * p.log(), 0.0) for w, p in ((1 - weights, first), (weights, second))]
    total = logs[0] + logs[1]
    return torch.where(torch.isneginf(total).all(-1, keepdim=True), 0.0, total).softmax(dim=-1)


def with_background(probabilities: Tensor, background: Tensor) -> Tensor:
    """Probabilities `(..., K)` of classes, times what the background leaves, and the background behind them."""
    return torch.cat([probabilities * (1 - background[..., None]), background[..., None]], dim=-1)


class MaskClassifier(nn.Module):
    """The vector of each query, and its cosines with texts: ODISE's open-vocabulary classification head.

    `m_q = MLP(LN(Linear(LN(pool_q)) + q))`, with the mean `pool_q` of the mask features inside the query's mask. Texts
    come from CLIP and are projected; the background is a vector that is learned, from CLIP's of the empty text on.

    Args:
        width: Of the queries and the mask features.
        text_dim: Of the texts' vectors.
        projection: Values that are compared.
        temperature: Of the cosines at first; the factor `1 / temperature` is learned, and is at most 100.

    Example:
        >>> head = MaskClassifier(8, 4)
        >>> vectors = head(torch.zeros(2, 5, 8), torch.zeros(2, 8, 3, 3), torch.zeros(2, 5, 3, 3))
        >>> head.logits(vectors, torch.randn(3, 4), [1, 2]).shape
        torch.Size([2, 5, 3])
    """

    def __init__(self, width: int, text_dim: int, projection: int = 256, temperature: float = 0.07) -> None:
        super().__init__()
        check_sizes(width=width, text_dim=text_dim, projection=projection)
        self.pooled = nn.Sequential(CastLayerNorm(width), CastLinear(width, width))
        widths = (width, width, width, projection)
        layers = [CastLinear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        self.embed = nn.Sequential(CastLayerNorm(width), layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        self.text = CastLinear(text_dim, projection)
        self.null = nn.Parameter(torch.zeros(1, text_dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    @property
    def scale(self) -> Tensor:
        """The factor on the cosines."""
        return self.log_scale.exp().clamp(max=_MOST_SCALE)

    def forward(self, queries: Tensor, features: Tensor, masks: Tensor) -> Tensor:
        """Vectors `(B, Q, projection)` of queries `(B, Q, width)`, by features `(B, width, h, w)` and mask logits."""
        return self.embed(self.pooled(pool_masks(features, masks)) + queries)

    def logits(self, vectors: Tensor, texts: Tensor, counts: Sequence[int]) -> Tensor:
        """`(B, Q, K + 1)`, the background last.

        Args:
            vectors: What `forward` gave.
            texts: `(N, text_dim)`, one a name, class after class.
            counts: Names of each of the K classes.
        """
        named = merge_synonyms(cosine_logits(vectors, self.text(texts), self.scale), counts)
        return torch.cat([named, cosine_logits(vectors, self.text(self.null), self.scale)], dim=-1)


__all__ = [
    "MaskClassifier",
    "cosine_logits",
    "geometric_ensemble",
    "merge_synonyms",
    "pool_masks",
    "with_background",
]
