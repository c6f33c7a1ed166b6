"""Fitting a head by stochastic gradient steps under a `MinibatchProtocol`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffusers_repr.heads.fitting.protocols import MinibatchProtocol
from diffusers_repr.heads.pooled.base import PooledHead


class LARS(torch.optim.Optimizer):
    """LARS (You et al. 2017, arXiv 1708.03888) in the form MoCo v3 and MAE probe with.

    For matrices the step is scaled by `trust_coefficient ||p|| / ||g||`; vectors (biases, norms) take plain momentum
    steps without weight decay.

    Args:
        params: Parameters.
        lr: Rate.
        momentum: Momentum.
        weight_decay: Added to the gradient of matrices.
        trust_coefficient: See above.
    """

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float, weight_decay: float, trust_coefficient: float
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "trust_coefficient": trust_coefficient,
            },
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                step = parameter.grad
                if parameter.ndim > 1:
                    step = step + group["weight_decay"] * parameter
                    size, length = parameter.norm(), step.norm()
                    ratio = group["trust_coefficient"] * size / length
                    step = step * torch.where((size > 0) & (length > 0), ratio, torch.ones_like(ratio))
                velocity = self.state[parameter].setdefault("velocity", torch.zeros_like(parameter))
                velocity.mul_(group["momentum"]).add_(step)
                parameter.add_(velocity, alpha=-group["lr"])


def protocol_rate(protocol: MinibatchProtocol, epoch: float, batch_size: int) -> float:
    """The rate at a point of training.

    Args:
        protocol: The protocol.
        epoch: Epochs done, with a fraction.
        batch_size: Rows of one step.

    Example:
        >>> from diffusers_repr.heads.fitting.protocols import PROTOCOLS
        >>> protocol_rate(PROTOCOLS["mae"], 5.0, 256)
        0.05
    """
    rate = protocol.learning_rate * (batch_size / 256 if protocol.rate_per_256 else 1)
    if epoch < protocol.warmup_epochs:
        return rate * epoch / protocol.warmup_epochs
    if protocol.schedule == "constant":
        return rate
    if protocol.schedule == "step_epoch":
        return rate * protocol.step_factor ** math.floor(epoch / protocol.step_epochs)
    if protocol.schedule == "cosine_epoch":
        epoch = math.floor(epoch)
    done = (epoch - protocol.warmup_epochs) / (protocol.epochs - protocol.warmup_epochs)
    return rate * (1 + math.cos(math.pi * done)) / 2


def train_head(
    head: PooledHead,
    features: Tensor,
    labels: Tensor,
    protocol: MinibatchProtocol,
    generator: torch.Generator,
) -> list[float]:
    """Train a head in place; draws only from `generator` (on the CPU).

    Args:
        head: In float32; its `mean` and `std` are used as they are, or set from BatchNorm's running statistics.
        features: `(N, D)`.
        labels: `(N,)` class ids.
        protocol: What to do.
        generator: Of the first weights and of the order of the rows.

    Returns:
        Mean loss of every epoch.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    device = head.mean.device
    features, labels = features.to(device), labels.to(device).long()
    start_head(head, protocol, generator)
    norm = None
    if protocol.batch_norm is not None:
        affine = protocol.batch_norm == "affine"
        norm = nn.BatchNorm1d(features.shape[1], protocol.norm_eps, protocol.norm_momentum, affine=affine).to(device)
    parameters = [p for module in (head, norm) if module is not None for p in module.parameters()]

    def loss(rows: Tensor) -> Tensor:
        inputs = features[rows].float()
        inputs = head.standardize(inputs) if norm is None else norm(inputs)
        return nn.functional.cross_entropy(head.classify(inputs), labels[rows])

    losses = descend(parameters, loss, len(features), protocol, generator)
    if norm is not None:
        _fold(norm, head)
    return losses


def descend(
    parameters: Sequence[nn.Parameter],
    loss: Callable[[Tensor], Tensor],
    count: int,
    protocol: MinibatchProtocol,
    generator: torch.Generator,
) -> list[float]:
    """Take the steps of a protocol.

    Args:
        parameters: What is trained, on one device.
        loss: From the numbers of a batch's rows, on that device, to the mean loss of these rows.
        count: Rows.
        protocol: What to do.
        generator: CPU generator of the order of the rows.

    Returns:
        Mean loss of every epoch.

    Raises:
        FloatingPointError: If a loss is not finite.
    """
    parameters, device = list(parameters), parameters[0].device
    optimizer = _optimizer(parameters, protocol)
    size = min(protocol.batch_size, count)
    steps = count // size if protocol.drop_last else -(-count // size)
    losses = []
    with torch.enable_grad():
        for epoch in range(protocol.epochs):
            order = torch.randperm(count, generator=generator).to(device)
            total = torch.zeros((), dtype=torch.float64, device=device)
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = protocol_rate(protocol, epoch + step / steps, size)
                value = loss(order[step * size : (step + 1) * size])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.detach()
            losses.append(float(total) / steps)
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(
                    f"The loss is {losses[-1]} in epoch {epoch} under protocol {protocol.name!r}; lower learning_rate "
                    "or check the features for NaN."
                )
    return losses


def start_head(head: PooledHead, protocol: MinibatchProtocol, generator: torch.Generator) -> None:
    """Draw the first weights of a head, from `generator` alone (on the CPU)."""
    drawn = copy.deepcopy(head).cpu()  # drawn on the CPU, so that every device starts alike
    drawn.reset_parameters(generator)
    if protocol.init_std is not None:
        last = drawn.linear_layers()[-1]
        nn.init.trunc_normal_(last.weight, std=protocol.init_std, generator=generator)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
    with torch.no_grad():
        for target, source in zip(head.parameters(), drawn.parameters(), strict=True):
            target.copy_(source)


def _optimizer(parameters: list[nn.Parameter], protocol: MinibatchProtocol) -> torch.optim.Optimizer:
    rate, decay = protocol.learning_rate, protocol.weight_decay
    if protocol.optimizer == "adam":
        return torch.optim.Adam(parameters, rate, weight_decay=decay)
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=protocol.momentum, weight_decay=decay)
    return LARS(list(parameters), rate, protocol.momentum, decay, protocol.trust_coefficient)


@torch.no_grad()
def _fold(norm: nn.BatchNorm1d, head: PooledHead) -> None:
    """Put BatchNorm's running statistics into `mean` and `std`, and its own weights into the first layer."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    head.set_statistics(norm.running_mean, (norm.running_var + norm.eps).sqrt())
    if norm.affine:
        layer = head.linear_layers()[0]
        if layer.bias is None:
            raise ValueError("An affine BatchNorm needs a first layer with a bias; use bias=True.")
        layer.bias.add_(layer.weight @ norm.bias)
        layer.weight.mul_(norm.weight)
