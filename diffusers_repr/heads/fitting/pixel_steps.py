"""`MemberSteps`: a step of Adam of all members of a `PixelEnsembleHead`, its gradients written out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adam import adam

from diffusers_repr.heads.pixel_ensemble import MemberBatchNorm, PixelEnsembleHead

_CHUNK = 2**17  # values of a weight whose gradient is made and used at a time on a CPU: what its caches hold
_BETAS, _EPS = (0.9, 0.999), 1e-8  # of torch's Adam


@dataclass
class _Moments:
    """A parameter and the moments of its gradient, as Adam keeps them."""

    value: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, value: Tensor) -> _Moments:
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))

    def index(self, at: list[int]) -> _Moments:
        return _Moments(self.value[at], self.first[at], self.second[at])

    def part(self, members: slice, rows: slice) -> _Moments:
        return _Moments(*(value[members, rows] for value in (self.value, self.first, self.second)))


class _Adam:
    """Adam for some parameters, called with their gradients in the same order each time."""

    def __init__(self, parameters: Sequence[_Moments], learning_rate: float, taken: int) -> None:
        self.parameters, self.learning_rate = parameters, learning_rate
        self.steps = [torch.full((), float(taken), device=one.value.device) for one in parameters]

    def step(self, gradients: Sequence[Tensor]) -> None:
        adam(
            [one.value for one in self.parameters],
            list(gradients),
            [one.first for one in self.parameters],
            [one.second for one in self.parameters],
            [],
            self.steps,
            fused=True,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=_EPS,
            maximize=False,
        )


class MemberSteps:
    """The members of a head that still learn.

    A layer is `z = x W + b`, `a = relu(z)`, and its batch norm `y = gamma n + beta` with `n = (a - mean) r`,
    `r = 1 / sqrt(var + eps)`. What enters the next layer is `n` itself, whose weights hold the batch norm:
    `z' = n (gamma W') + (beta W' + b')`. With `D = dloss/dz'`, a `(rows, out)` matrix, and `M = n^T D`:

    - `dW' = gamma M + beta sum(D)`, `db' = sum(D)`, `dgamma = rowsum(W' M)`, `dbeta = W' sum(D)`;
    - `dz = (D (r gamma W')^T - r gamma dbeta / B - n r gamma dgamma / B) [z > 0]`.

    So one pass over a hidden layer's values gives what autograd needs several for, and no gradient of a first layer is
    held: it is made and used in parts that stay in a CPU's cache. Weights lie as `(E, in, out)`, in which both
    products with the pixels read them row by row; those of the first layer by the blocks that the features come in.

    Args:
        head: In float32 or wider; left as it is until `keep`.
        columns: For each block of the features, which columns of a pixel's feature it holds; `SampledMaps.columns`.
        learning_rate: Of Adam.
    """

    def __init__(self, head: PixelEnsembleHead, columns: Sequence[Sequence[slice]], learning_rate: float) -> None:
        self.learning_rate, self.taken = learning_rate, 0
        self.columns = [list(places) for places in columns]
        norms: list[MemberBatchNorm] = list(head.norm)  # type: ignore[arg-type]
        self.eps, self.momentum = [norm.eps for norm in norms], [norm.momentum for norm in norms]
        first, *others = [*head.linear, head.last]
        weights = [torch.cat([first.weight.detach()[..., part] for part in places], 2) for places in self.columns]
        self.first = [_Moments.of(weight.mT.contiguous()) for weight in weights]
        self.weights = [_Moments.of(layer.weight.detach().mT.clone(memory_format=torch.contiguous_format))
                        for layer in others]  # fmt: skip
        self.biases = [_Moments.of(layer.bias.detach().clone()) for layer in (first, *others)]
        self.gammas = [_Moments.of(norm.weight.detach().clone()) for norm in norms]
        self.betas = [_Moments.of(norm.bias.detach().clone()) for norm in norms]
        self.means = [norm.running_mean.clone() for norm in norms]
        self.variances = [norm.running_var.clone() for norm in norms]
        self._optimizers()

    def _optimizers(self) -> None:
        """One for each part of the first layer's weights, and one for all else."""
        self.parts: list[list[tuple[slice, slice, _Adam]]] = []
        for block in self.first:
            parts = list(_parts(block.value.shape, block.value.device.type))
            self.parts.append([(m, r, self._adam([block.part(m, r)])) for m, r in parts])
        self.rest = self._adam([*self.weights, *self.biases, *self.gammas, *self.betas])

    def _adam(self, parameters: list[_Moments]) -> _Adam:
        return _Adam(parameters, self.learning_rate, self.taken)

    @torch.no_grad()
    def step(self, blocks: Sequence[Tensor], labels: Tensor) -> Tensor:
        """One step of every member on pixels of its own.

        Args:
            blocks: Their features in parts, `(E, B, L_g)` each.
            labels: `(E, B)` int64.

        Returns:
            Loss of each member before the step, `(E,)`.
        """
        z = torch.bmm(blocks[0], self.first[0].value)
        for block, weight in zip(blocks[1:], self.first[1:], strict=True):
            z.baddbmm_(block, weight.value)
        z += self.biases[0].value[:, None]
        hidden = []
        for at, (weight, gamma) in enumerate(zip(self.weights, self.gammas, strict=True)):
            hidden.append(self._normal(at, z.relu_()))
            z = torch.baddbmm(self._offset(at), hidden[at].normal, gamma.value[..., None] * weight.value)
        told = z.log_softmax(2)
        losses = -told.gather(2, labels[..., None]).mean((1, 2))
        slope = told.exp_()
        slope.scatter_add_(2, labels[..., None], slope.new_full((), -1.0).expand(*labels.shape, 1))
        self._backward(blocks, hidden, slope.div_(labels.shape[1]))
        self.taken += 1
        return losses

    def _normal(self, at: int, a: Tensor) -> _Hidden:
        """A batch norm without its scale; its running statistics move."""
        mean, rows = a.mean(1), a.shape[1]
        n = a - mean[:, None]
        variance = n.square().mean(1)
        self.means[at].lerp_(mean, self.momentum[at])
        self.variances[at].lerp_(variance * (rows / (rows - 1)), self.momentum[at])
        r = (variance + self.eps[at]).rsqrt_()
        return _Hidden(a, n.mul_(r[:, None]), r)

    def _offset(self, at: int) -> Tensor:
        """`beta W' + b'`, `(E, 1, out)`."""
        bias, beta, weight = (of[at + (of is self.biases)].value for of in (self.biases, self.betas, self.weights))
        return torch.baddbmm(bias[:, None], beta[:, None], weight)

    def _backward(self, blocks: Sequence[Tensor], hidden: list[_Hidden], slope: Tensor) -> None:
        """Gradients from `D` of the logits back, and Adam with them."""
        weights, biases, gammas, betas = [], [slope.sum(1)], [], []
        for at in reversed(range(len(hidden))):
            layer, weight, gamma, beta = (
                hidden[at],
                self.weights[at].value,
                self.gammas[at].value,
                self.betas[at].value,
            )
            product, total = torch.bmm(layer.normal.mT, slope), biases[-1]
            weights.append(torch.addcmul(gamma[..., None] * product, beta[..., None], total[:, None]))
            gammas.append((weight * product).sum(2))
            betas.append((weight * total[:, None]).sum(2))
            scale, share = layer.scale * gamma, -1 / slope.shape[1]
            slope = torch.baddbmm((scale * betas[-1])[:, None], slope, (scale[..., None] * weight).mT, beta=share)
            slope.addcmul_(layer.normal, (scale * gammas[-1])[:, None], value=share).mul_(layer.output.sign_())
            biases.append(slope.sum(1))
        for parts, block in zip(self.parts, blocks, strict=True):
            for members, rows, optimizer in parts:
                optimizer.step([torch.bmm(block[members, :, rows].mT, slope[members])])
        self.rest.step([one for of in (weights, biases, gammas, betas) for one in reversed(of)])

    def take(self, places: list[int]) -> None:
        """Only these members learn on."""
        for name in ("first", "weights", "biases", "gammas", "betas"):
            setattr(self, name, [one.index(places) for one in getattr(self, name)])
        self.means, self.variances = ([one[places] for one in of] for of in (self.means, self.variances))
        self._optimizers()

    @torch.no_grad()
    def keep(self, head: PixelEnsembleHead, places: Sequence[int], members: Sequence[int]) -> None:
        """Put the members at `places` here into the head, as its `members`."""
        at, to = list(places), list(members)
        first, *others = [*head.linear, head.last]
        for block, columns in zip(self.first, self.columns, strict=True):
            parts = block.value[at].mT.split([part.stop - part.start for part in columns], 2)
            for part, column in zip(parts, columns, strict=True):
                first.weight[to, :, column] = part
        for layer, weight in zip(others, self.weights, strict=True):
            layer.weight[to] = weight.value[at].mT
        for layer, bias in zip((first, *others), self.biases, strict=True):
            layer.bias[to] = bias.value[at]
        for norm, *values in zip(head.norm, self.gammas, self.betas, self.means, self.variances, strict=True):
            norm.weight[to], norm.bias[to] = values[0].value[at], values[1].value[at]
            norm.running_mean[to], norm.running_var[to] = values[2][at], values[3][at]


@dataclass(frozen=True)
class _Hidden:
    """What a step keeps of a hidden layer: `a` and `n`, `(E, B, width)`, and `r`, `(E, width)`."""

    output: Tensor
    normal: Tensor
    scale: Tensor


def _parts(shape: torch.Size, device: str) -> Iterator[tuple[slice, slice]]:
    """Members and rows of weights `(E, in, out)` that are made and used together."""
    members, rows, width = shape
    if device != "cpu":  # a call costs more there than the memory of a gradient
        yield slice(0, members), slice(0, rows)
        return
    high = min(rows, max(1, _CHUNK // width))
    wide = max(1, _CHUNK // (rows * width))
    for start in range(0, members, wide):
        for top in range(0, rows, high):
            yield slice(start, min(start + wide, members)), slice(top, min(top + high, rows))


__all__ = ["MemberSteps"]
