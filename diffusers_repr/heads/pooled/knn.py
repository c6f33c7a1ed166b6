"""A vote of the nearest training features; nothing is learned."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_repr.heads.base import register_head
from diffusers_repr.heads.pooled.base import PooledHead

METRICS = ("cosine", "euclidean")


@register_head("knn")
class KNNHead(PooledHead, ModelMixin, ConfigMixin):
    """Weighted vote of the k nearest features of a bank.

    With similarities `s_i` to the k nearest rows of the bank, `p(c) = sum_{i in c} exp(s_i / T) / sum_i exp(s_i / T)`
    (Wu et al. 2018, arXiv 1805.01978, section 3.4, where `s` is the cosine and `T = 0.07`). The logits are the
    logarithm of that sum, so `softmax(logits)` is `p`; a class without a neighbour has `-inf`. For `euclidean`,
    `s = -||a - b||`. Of equally near rows the one that stands first in the bank counts.

    Args:
        in_features: D, values of a pooled feature.
        num_classes: K.
        bank_size: Rows of the bank; `set_bank` fills it.
        k: Neighbours that vote, at most `bank_size`.
        temperature: T; None lets every neighbour count one, which suits `euclidean`.
        metric: `cosine` or `euclidean`, on standardised features.

    Example:
        >>> head = KNNHead(2, 2, bank_size=2, k=1)
        >>> head.set_bank(torch.eye(2), torch.tensor([0, 1]))
        >>> head(torch.tensor([[3.0, 1.0]])).argmax(1)
        tensor([0])
    """

    default_protocol = "knn"
    takes_steps = False

    bank: Tensor
    bank_labels: Tensor
    _ROWS = 1024  # queries compared with the bank at a time

    @register_to_config
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bank_size: int,
        k: int = 20,
        temperature: float | None = 0.07,
        metric: str = "cosine",
    ) -> None:
        super().__init__()
        self.make_statistics(in_features, num_classes)
        if not 1 <= k <= bank_size:
            raise ValueError(f"k={k} neighbours of a bank of {bank_size} rows; k runs from 1 to the bank's size.")
        if metric not in METRICS:
            raise ValueError(f"Unknown metric {metric!r}; expected one of {', '.join(METRICS)}.")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"temperature must be above 0, or None for equal votes; got {temperature!r}.")
        self.register_buffer("bank", torch.zeros(bank_size, in_features))
        self.register_buffer("bank_labels", torch.zeros(bank_size, dtype=torch.long))

    def set_bank(self, features: Tensor, labels: Tensor) -> None:
        """Fill the bank.

        Args:
            features: `(bank_size, in_features)`, not standardised; set `set_statistics` before.
            labels: `(bank_size,)` class ids.

        Raises:
            ValueError: If the shapes or the labels do not fit.
        """
        if tuple(features.shape) != tuple(self.bank.shape) or tuple(labels.shape) != tuple(self.bank_labels.shape):
            raise ValueError(
                f"The bank takes features {tuple(self.bank.shape)} and {len(self.bank)} labels; got "
                f"{tuple(features.shape)} and {tuple(labels.shape)}."
            )
        if int(labels.min()) < 0 or int(labels.max()) >= self.config["num_classes"]:
            raise ValueError(f"Labels run from 0 to {self.config['num_classes'] - 1}; got up to {int(labels.max())}.")
        self.bank.copy_(self.standardize(features))
        self.bank_labels.copy_(labels)

    def classify(self, features: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of standardised features."""
        return torch.cat([self._vote(part) for part in features.split(self._ROWS)])

    def _vote(self, features: Tensor) -> Tensor:
        bank = self.bank.float()
        if self.config["metric"] == "cosine":
            similar = torch.nn.functional.normalize(features, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
        else:
            similar = -torch.cdist(features, bank, compute_mode="donot_use_mm_for_euclid_dist")
        # A stable sort, not `topk`: which of two equal rows counts must not depend on the machine.
        near, rows = similar.sort(dim=1, descending=True, stable=True)
        near, labels = near[:, : self.config["k"]], self.bank_labels[rows[:, : self.config["k"]]]
        temperature = self.config["temperature"]
        weights = torch.zeros_like(near) if temperature is None else near / temperature
        of_class = labels[:, :, None] == torch.arange(self.config["num_classes"], device=labels.device)
        return weights[:, :, None].masked_fill(~of_class, -torch.inf).logsumexp(dim=1)
