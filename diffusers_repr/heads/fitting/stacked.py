"""Many linear heads at once, each on features of its own: one batched product a step trains a whole grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_repr.heads.fitting.minibatch import protocol_rate, start_head
from diffusers_repr.heads.fitting.protocols import MinibatchProtocol
from diffusers_repr.heads.pooled.linear import LinearHead


@dataclass(frozen=True)
class LinearStack:
    """Linear heads on features of equal length, one a cell of a grid.

    Attributes:
        weight: `(G, K, D)`.
        bias: `(G, K)`.
        mean: `(G, D)`, subtracted from features.
        std: `(G, D)`, what they are divided by.
        losses: Mean loss of the last epoch of each, `(G,)` float64.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    losses: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """`(G, n, K)` of features `(G, n, D)`."""
        inputs = (features.to(self.mean.device).float() - self.mean[:, None]) / self.std[:, None]
        return torch.baddbmm(self.bias[:, None], inputs, self.weight.mT)

    def head(self, at: int) -> LinearHead:
        """One of them by itself."""
        head = LinearHead(self.weight.shape[2], self.weight.shape[1]).to(self.weight.device)
        with torch.no_grad():
            head.linear.weight.copy_(self.weight[at])
            head.linear.bias.copy_(self.bias[at])
        head.set_statistics(self.mean[at], self.std[at])
        return head.eval()


def check_stacked(protocol: MinibatchProtocol) -> None:
    """Refuse what is not done head by head in one product.

    Raises:
        ValueError: For a protocol with BatchNorm or LARS.
    """
    if protocol.batch_norm is not None or protocol.optimizer == "lars":
        raise ValueError(
            f"Protocol {protocol.name!r} has batch_norm={protocol.batch_norm!r} and optimizer={protocol.optimizer!r}; "
            "a grid of heads is trained by adam or sgd without BatchNorm, such as 'ddae'. `linear_probe` fits one "
            "head under any protocol."
        )


@torch.no_grad()
def train_linear_heads(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    protocol: MinibatchProtocol,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> LinearStack:
    """Train a linear head for each cell, independent of one another: each ends as it would alone.

    All start from the weights and see the rows in the order that `fit_head` draws from the same seed.

    Args:
        features: `(G, N, D)` of G cells; or `(G, R, N, D)` with R draws of noise or of crops, of which epoch e reads
            draw `e mod R`.
        labels: `(N,)` class ids.
        num_classes: K.
        protocol: What to do.
        seed: Of the first weights and of the order of the rows.
        device: Where to compute; the features may stay elsewhere. Theirs if None.

    Raises:
        ValueError: As `check_stacked`, and for shapes that do not fit.
        FloatingPointError: If a head's loss is not finite; names the cell.
    """
    check_stacked(protocol)
    drawn = features[:, None] if features.ndim == 3 else features
    if drawn.ndim != 4 or len(labels) != drawn.shape[2] or not drawn.numel():
        raise ValueError(
            f"features must be (G, N, D) or (G, R, N, D) with one label a row; got {tuple(features.shape)} and "
            f"{len(labels)} labels."
        )
    where = torch.device(device or features.device)
    cells, draws, rows, size = drawn.shape
    generator, head = torch.Generator().manual_seed(seed), LinearHead(size, num_classes)
    start_head(head, protocol, generator)
    weight = head.linear.weight.detach().to(where).expand(cells, -1, -1).clone()
    bias = head.linear.bias.detach().to(where).expand(cells, -1).clone()
    mean, std = torch.zeros(cells, size, device=where), torch.ones(cells, size, device=where)
    if protocol.standardize:
        for at, cell in enumerate(drawn):
            spread, centre = torch.std_mean(cell.flatten(0, 1).double(), dim=0, correction=0)
            mean[at] = centre
            std[at] = torch.where(spread <= 1e-7 * centre.abs(), torch.ones_like(spread), spread)
    rule = _Rule(protocol, [weight, bias])
    batch = min(protocol.batch_size, rows)
    steps = rows // batch if protocol.drop_last else -(-rows // batch)
    labels, total = labels.long(), torch.zeros(cells, dtype=torch.float64)
    for epoch in range(protocol.epochs):
        order, total = torch.randperm(rows, generator=generator), torch.zeros_like(total)
        for step in range(steps):
            places = order[step * batch : (step + 1) * batch]
            inputs = drawn[:, epoch % draws, places.to(drawn.device)].to(where).float()
            inputs = (inputs - mean[:, None]) / std[:, None] if protocol.standardize else inputs
            target = labels[places.to(labels.device)].to(where).expand(cells, -1)[:, :, None]
            log_p = torch.baddbmm(bias[:, None], inputs, weight.mT).log_softmax(2)
            total -= log_p.gather(2, target).mean(dim=(1, 2)).double().cpu()
            # The gradient of the mean cross-entropy: (p - one-hot) / n.
            error = log_p.exp().scatter_add_(2, target, -torch.ones_like(log_p)) / len(places)
            rule.step([error.mT @ inputs, error.sum(1)], protocol_rate(protocol, epoch + step / steps, batch))
        if not bool(total.isfinite().all()):
            bad = int((~total.isfinite()).nonzero()[0])
            raise FloatingPointError(
                f"The loss of head {bad} is {float(total[bad])} in epoch {epoch} under protocol {protocol.name!r}; "
                "lower learning_rate or check the features for NaN."
            )
    return LinearStack(weight, bias, mean, std, total / steps)


class _Rule:
    """Torch's own Adam or SGD: it works value by value, so stacked weights move as each would alone."""

    def __init__(self, protocol: MinibatchProtocol, parameters: list[Tensor]) -> None:
        self.parameters, rate, decay = parameters, protocol.learning_rate, protocol.weight_decay
        self.optimizer: torch.optim.Optimizer
        if protocol.optimizer == "adam":
            self.optimizer = torch.optim.Adam(parameters, rate, weight_decay=decay)
        else:
            self.optimizer = torch.optim.SGD(parameters, rate, momentum=protocol.momentum, weight_decay=decay)

    def step(self, gradients: list[Tensor], rate: float) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()


__all__ = ["LinearStack", "check_stacked", "train_linear_heads"]
