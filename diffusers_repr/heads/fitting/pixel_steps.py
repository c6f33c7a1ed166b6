"""`MemberSteps`: a step of Adam of all members of a `PixelEnsembleHead`, its gradients written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from diffusers_repr.heads.pixel_ensemble import PixelEnsembleHead


@dataclass(frozen=True)
class _Weights:
    """Views of rows that hold a member's weights each, or their gradients.

    Attributes:
        linear: Of each layer, `(E, in, out)`, in which both products with the pixels read rows.
        bias: Of each layer, `(E, out)`.
        gamma: Of each batch norm, `(E, width)`.
        beta: The same.
    """

    linear: list[Tensor]
    bias: list[Tensor]
    gamma: list[Tensor]
    beta: list[Tensor]

    @classmethod
    def of(cls, rows: Tensor, sizes: Sequence[int]) -> _Weights:
        shapes = _shapes(sizes)
        parts = rows.split([math.prod(shape) for shape in shapes], 1)
        views = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        layers, norms = len(sizes) - 1, len(sizes) - 2
        ends = [layers, 2 * layers, 2 * layers + norms]
        return cls(views[: ends[0]], views[ends[0] : ends[1]], views[ends[1] : ends[2]], views[ends[2] :])


def _shapes(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Of all weights of a member whose layers have these widths, the pixels' features first."""
    return [*itertools.pairwise(sizes), *((size,) for size in sizes[1:]), *2 * [(size,) for size in sizes[1:-1]]]


@dataclass(frozen=True)
class _Hidden:
    """What a step keeps of a hidden layer: `a` and `n`, `(E, B, width)`, and `r`, `(E, width)`."""

    output: Tensor
    normal: Tensor
    scale: Tensor


class MemberSteps:
    """The members of a head that still learn, and the moments of their gradients.

    A layer is `z = x W + b`, `a = relu(z)`, and its batch norm `y = gamma n + beta` with `n = (a - mean) r`,
    `r = 1 / sqrt(var + eps)`. What enters the next layer is `n` itself, and its weights take the batch norm in:
    `z' = n (gamma W') + (beta W' + b')`. With `D = dloss/dz'`, a `(B, out)` matrix, and `M = n^T D`:

    - `dW' = gamma M + beta sum(D)`, `db' = sum(D)`, `dgamma = rowsum(W' M)`, `dbeta = W' sum(D)`;
    - `dz = (D (r gamma W')^T - r gamma dbeta / B - n r gamma dgamma / B) [z > 0]`.

    Weights and gradients of a member are one row each, so Adam is one call for all of them; a gradient is written into
    its place, and nothing is set to zero or copied. The first layer's inputs are in the order of the blocks that the
    features come in.

    Args:
        head: In float32 or wider; left as it is until `keep`.
        columns: For each block of the features, which columns of a pixel's feature it holds; `SampledMaps.columns`.
        learning_rate: Of Adam.
    """

    def __init__(self, head: PixelEnsembleHead, columns: Sequence[Sequence[slice]], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.columns = [list(places) for places in columns]
        self.sizes = [head.in_features, *head.widths, int(head.config["num_classes"])]
        self.widths = [sum(place.stop - place.start for place in places) for places in self.columns]
        norms: list[Any] = list(head.norm)
        self.eps, self.momentum = [norm.eps for norm in norms], [norm.momentum for norm in norms]
        like = head.last.weight
        self.rows = like.new_empty(len(like), sum(map(math.prod, _shapes(self.sizes))), requires_grad=False)
        self.moments = torch.zeros_like(self.rows), torch.zeros_like(self.rows)
        self.taken = torch.zeros((), device=like.device)
        self.means, self.variances = ([of.clone() for of in value] for value in _statistics(head))
        self._view()
        with torch.no_grad():
            for here, there in self._pairs(head):
                here.copy_(there)

    def _view(self) -> None:
        self.gradients = torch.empty_like(self.rows)
        self.weights, self.slopes = (_Weights.of(rows, self.sizes) for rows in (self.rows, self.gradients))

    def _pairs(self, head: PixelEnsembleHead) -> list[tuple[Tensor, Tensor]]:
        """Each weight here and in the head."""
        layers: list[Any] = [*head.linear, head.last]
        norms: list[Any] = list(head.norm)
        first, *others = layers
        blocks = [place for places in self.columns for place in places]
        parts = self.weights.linear[0].split([place.stop - place.start for place in blocks], 1)
        pairs = [(part, first.weight[..., place].mT) for part, place in zip(parts, blocks, strict=True)]
        pairs += [(w, layer.weight.mT) for w, layer in zip(self.weights.linear[1:], others, strict=True)]
        pairs += [(b, layer.bias) for b, layer in zip(self.weights.bias, (first, *others), strict=True)]
        pairs += [(g, norm.weight) for g, norm in zip(self.weights.gamma, norms, strict=True)]
        return pairs + [(b, norm.bias) for b, norm in zip(self.weights.beta, norms, strict=True)]

    @torch.no_grad()
    def step(self, blocks: Sequence[Tensor], labels: Tensor) -> Tensor:
        """One step of every member on pixels of its own.

        Args:
            blocks: Their features in parts, `(E, B, L_g)` each.
            labels: `(E, B)` int64.

        Returns:
            Loss of each member before the step, `(E,)`.
        """
        weights, hidden = self.weights, []
        z = weights.bias[0][:, None]
        for block, weight in zip(blocks, weights.linear[0].split(self.widths, 1), strict=True):
            z = torch.baddbmm(z, block, weight)
        for at, (gamma, beta) in enumerate(zip(weights.gamma, weights.beta, strict=True)):
            hidden.append(self._normal(at, z.relu_()))
            weight, bias = weights.linear[at + 1], weights.bias[at + 1][:, None]
            offset = torch.baddbmm(bias, beta[:, None], weight)
            z = torch.baddbmm(offset, hidden[at].normal, gamma[..., None] * weight)
        told = z.log_softmax(2)
        losses = -told.gather(2, labels[..., None]).mean((1, 2))
        slope = told.exp_()
        slope.scatter_add_(2, labels[..., None], slope.new_full((), -1.0).expand(*labels.shape, 1))
        self._backward(blocks, hidden, slope.div_(labels.shape[1]))
        self._adam()
        return losses

    def _normal(self, at: int, a: Tensor) -> _Hidden:
        """A batch norm without its scale; its running statistics move."""
        mean, count = a.mean(1), a.shape[1]
        n = a - mean[:, None]
        variance = n.square().mean(1)
        self.means[at].lerp_(mean, self.momentum[at])
        self.variances[at].lerp_(variance * (count / (count - 1)), self.momentum[at])
        r = (variance + self.eps[at]).rsqrt_()
        return _Hidden(a, n.mul_(r[:, None]), r)

    def _backward(self, blocks: Sequence[Tensor], hidden: list[_Hidden], slope: Tensor) -> None:
        """The gradients, from `D` of the logits back."""
        found, share = self.slopes, -1 / slope.shape[1]
        for at in reversed(range(len(hidden))):
            layer, weight, gamma = hidden[at], self.weights.linear[at + 1], self.weights.gamma[at][..., None]
            total = torch.sum(slope, 1, out=found.bias[at + 1])[:, None]
            product = torch.bmm(layer.normal.mT, slope)
            torch.addcmul(gamma * product, self.weights.beta[at][..., None], total, out=found.linear[at + 1])
            dgamma = torch.sum(weight * product, 2, out=found.gamma[at])[:, None]
            dbeta = torch.sum(weight * total, 2, out=found.beta[at])[:, None]
            scale = layer.scale[..., None] * gamma
            slope = torch.baddbmm(scale.mT * dbeta, slope, (scale * weight).mT, beta=share)
            slope.addcmul_(layer.normal, scale.mT * dgamma, value=share).mul_(layer.output.sign_())
        torch.sum(slope, 1, out=found.bias[0])
        for block, place in zip(blocks, found.linear[0].split(self.widths, 1), strict=True):
            torch.bmm(block.mT, slope, out=place)

    def _adam(self) -> None:
        adam(
            [self.rows],
            [self.gradients],
            [self.moments[0]],
            [self.moments[1]],
            [],
            [self.taken],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def take(self, places: list[int]) -> None:
        """Only these members learn on."""
        self.rows, self.moments = self.rows[places], (self.moments[0][places], self.moments[1][places])
        self.means, self.variances = ([one[places] for one in of] for of in (self.means, self.variances))
        self._view()

    @torch.no_grad()
    def keep(self, head: PixelEnsembleHead, places: Sequence[int], members: Sequence[int]) -> None:
        """Put the members at `places` here into the head, as its `members`."""
        pairs = self._pairs(head)
        for ours, theirs in zip((self.means, self.variances), _statistics(head), strict=True):
            pairs += zip(ours, theirs, strict=True)
        for here, there in pairs:
            for place, member in zip(places, members, strict=True):
                there[member].copy_(here[place])


def _statistics(head: PixelEnsembleHead) -> tuple[list[Tensor], list[Tensor]]:
    norms: list[Any] = list(head.norm)
    return [norm.running_mean for norm in norms], [norm.running_var for norm in norms]


__all__ = ["MemberSteps"]
