"""Sinkhorn-Knopp: clusters of equal size, found while a model is trained, over the batches of all processes."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.assign.base import Assigner, register_assigner
from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import CastBatchNorm1d, CastLayerNorm, CastLinear

Norm = Literal["batch", "layer", "none"]
_FIT_STEPS, _FIT_BATCH = 200, 256
_FIRST = 4096  # features among which prototypes start


@torch.no_grad()
def sinkhorn_knopp(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignments in which every prototype has about as many samples as every other (Cuturi 2013; SwAV).

    `exp(scores / epsilon)` is scaled in turn so that each prototype's column has the same sum over the samples of all
    processes, and each sample's row the sum 1; the row comes last.

    Args:
        scores: Of samples and prototypes `(B, K)`, those of this process; under `torch.distributed` every process has
            some, of any number.
        epsilon: Entropy of the assignment; less is harder.
        iterations: How often both are scaled; columns are about equal after 3, and equal to rounding after 20.

    Returns:
        `(B, K)`, float32 or wider.

    Raises:
        ValueError: For other shapes, scores that are not finite, and numbers out of range.

    Example:
        >>> sinkhorn_knopp(torch.tensor([[1.0, 0.9], [1.0, 0.0]]), epsilon=0.01, iterations=10).round()
        tensor([[0., 1.],
                [1., 0.]])
    """
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(f"scores are (B, K); got {tuple(scores.shape)}.")
    if not epsilon > 0 or iterations < 1:
        raise ValueError(f"epsilon is positive and iterations at least 1; got {epsilon} and {iterations}.")
    if not bool(scores.isfinite().all()):
        raise ValueError("The scores have NaN or infinite values.")
    return _balanced(scores, epsilon, iterations)


def _balanced(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    logits = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    # What is added to all scores of one prototype is cancelled by its first scaling; so its greatest is made 0.
    shares = (logits - _over_all(logits.amax(0), "max")).exp()
    for _ in range(iterations):
        shares = shares / _over_all(shares.sum(0), "sum")
        shares = shares / shares.sum(1, keepdim=True)
    return shares


def _over_all(value: Tensor, how: Literal["sum", "max"]) -> Tensor:
    """Reduced over the processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return value


@register_assigner("sinkhorn")
class SinkhornAssigner(Assigner):
    """The nearest of prototypes that are learned together with a head on the features (online guidance, SwAV).

    A head (linear, norm, ReLU, linear) gives `q`, of length 1, and the cosines of q and the prototypes are the scores.
    `OnlineGuidanceObjective` trains it beside a diffusion model; `fit` trains it on features that are there, towards
    the assignments of `sinkhorn_knopp`.

    Args:
        in_features: D of the features.
        num_prototypes: K.
        embed_dim: Channels of q and of a prototype; D if None.
        hidden_features: Of the head; half of D if None.
        norm: Of the head: `batch` as the paper's code, whose assignments in training and in use then differ; `layer`
            or `none`.
        output: What it gives: the prototype's id, `class`, or the prototype itself, `vector`.
        normalize: Scale features to length 1 first.

    Example:
        >>> assigner = SinkhornAssigner(4, num_prototypes=3, norm="layer")
        >>> assigner.scores(torch.randn(2, 4)).shape, int(assigner.null)
        (torch.Size([2, 3]), 3)
    """

    gives = "class"

    @register_to_config
    def __init__(
        self,
        in_features: int,
        num_prototypes: int = 10,
        embed_dim: int | None = None,
        hidden_features: int | None = None,
        norm: str = "batch",
        output: str = "class",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        self.make_state(in_features, normalize)
        embed = in_features if embed_dim is None else embed_dim
        hidden = max(1, in_features // 2) if hidden_features is None else hidden_features
        check_sizes(num_prototypes=num_prototypes, embed_dim=embed, hidden_features=hidden)
        if norm not in get_args(Norm) or output not in ("class", "vector"):
            raise ValueError(
                f"norm is one of {', '.join(get_args(Norm))} and output class or vector; got {norm!r} and {output!r}."
            )
        self.gives = output  # type: ignore[misc,assignment]
        norms: dict[str, Any] = {"batch": CastBatchNorm1d, "layer": CastLayerNorm, "none": nn.Identity}
        self.head = nn.Sequential(
            CastLinear(in_features, hidden), norms[norm](hidden), nn.ReLU(), CastLinear(hidden, embed)
        )
        self.prototypes = nn.Parameter(F.normalize(torch.randn(num_prototypes, embed), dim=1))

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings `(B, embed_dim)` of length 1, from prepared features `(B, D)`."""
        return F.normalize(self.head(features), dim=1)

    def unit_prototypes(self) -> Tensor:
        """`(K, embed_dim)` of length 1, float32 or wider."""
        return F.normalize(self.prototypes.to(torch.promote_types(self.prototypes.dtype, torch.float32)), dim=1)

    def scores(self, features: Tensor) -> Tensor:
        """Cosines `(B, K)` of q and the prototypes, differentiable; features as they are, float32."""
        if self.normalize:
            features = F.normalize(features, dim=1)
        return self.embed(features) @ self.unit_prototypes().T.to(features.dtype)

    @torch.enable_grad()
    def fit_prepared(self, features: Tensor, generator: torch.Generator) -> None:
        """Train head and prototypes for 200 steps of Adam on batches of 256 features."""
        self.reset(generator)
        if len(features) < self.config["num_prototypes"]:
            raise ValueError(f"{len(features)} features cannot fill {self.config['num_prototypes']} prototypes.")
        self.train()
        self.prototypes.data.copy_(_far_apart(self.embed(features[:_FIRST]).detach(), len(self.prototypes)))
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        for _ in range(_FIT_STEPS):
            rows = torch.randperm(len(features), generator=generator)[:_FIT_BATCH].to(features.device)
            scores = self.embed(features[rows]) @ self.unit_prototypes().T
            optimizer.zero_grad(set_to_none=True)
            clustering_loss(scores).mean().backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.eval()

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Draw new weights."""
        for module in self.head:
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                for parameter in module.parameters():
                    drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                    parameter.copy_(drawn)
            elif isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
                module.reset_parameters()
        drawn = torch.randn(self.prototypes.shape, generator=generator)
        self.prototypes.copy_(F.normalize(drawn, dim=1))

    def assign_prepared(self, features: Tensor) -> Tensor:
        """Ids `(B,)`, or prototypes `(B, embed_dim)` of length 1; by the statistics of training, as in eval mode."""
        trained = self.training
        self.eval()
        ids = (self.embed(features) @ self.unit_prototypes().T).argmax(1)
        self.train(trained)
        return ids if self.gives == "class" else self.unit_prototypes()[ids].float()

    def forward(self, features: Tensor, assign: bool = True) -> Tensor:
        """As `assign`, or without it the scores `(B, K)` with their graph.

        Args:
            features: `(B, D)`.
            assign: False for the scores.
        """
        return self.assign(features) if assign else self.scores(features)

    @property
    def null(self) -> Tensor:
        """K, or zeros."""
        if self.gives == "class":
            return torch.tensor(self.config["num_prototypes"], device=self.fitted.device)
        return torch.zeros_like(self.prototypes[0], dtype=torch.float32)


def _far_apart(rows: Tensor, count: int) -> Tensor:
    """The first of the unit vectors, and then each the farthest from those that are chosen."""
    nearest = rows @ rows[0]
    chosen = [0]
    for _ in range(count - 1):
        chosen.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, rows @ rows[chosen[-1]])
    return rows[chosen]


def clustering_loss(scores: Tensor, epsilon: float = 0.05, iterations: int = 3, temperature: float = 0.1) -> Tensor:
    """Cross-entropy `(B,)` of the softmax over the scores and their balanced assignments (online guidance, SwAV).

    Args:
        scores: `(B, K)`; a gradient goes through the softmax alone.
        epsilon: Of `sinkhorn_knopp`.
        iterations: Of `sinkhorn_knopp`.
        temperature: Of the softmax.
    """
    # Unchecked: a step whose scores overflow is skipped by the loop, which sees it by its loss.
    targets = _balanced(scores.detach(), epsilon, iterations)
    return -(targets * F.log_softmax(scores / temperature, dim=1)).sum(1)


__all__ = ["SinkhornAssigner", "clustering_loss", "sinkhorn_knopp"]
