"""`ClassTokenHead`: the way of a teacher's class token into a transformer and out of it (REG)."""

from __future__ import annotations

from collections.abc import Mapping

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from diffusers_repr.models.layers import CastLayerNorm, CastLinear, wide_dtype
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput, packed


class ClassTokenHead(ReprModelMixin, ModelMixin, ConfigMixin):
    """What a network needs to denoise a class token together with its image (REG, arXiv 2507.01467).

    Into the sequence by a linear layer and a layer norm, with weights of its own; out of it, after the network's last
    norm, by another linear layer, which is 0 at first, as the layer that the image leaves by. It computes in float32
    or wider, whatever the dtype of its weights.

    Args:
        hidden_dim: The transformer's width.
        token_dim: Of the teacher's class token.

    Example:
        >>> import torch
        >>> head = ClassTokenHead(8, 5)
        >>> head.enter(torch.ones(2, 5)).shape, head.leave(torch.ones(2, 8)).shape
        (torch.Size([2, 8]), torch.Size([2, 5]))
    """

    _no_split_modules: list[str] = []

    @register_to_config
    def __init__(self, hidden_dim: int, token_dim: int) -> None:
        super().__init__()
        self.embed = CastLinear(token_dim, hidden_dim)
        self.norm = CastLayerNorm(hidden_dim, eps=1e-6)
        self.read = CastLinear(hidden_dim, token_dim)
        nn.init.xavier_uniform_(self.embed.weight)
        nn.init.zeros_(self.embed.bias)
        for parameter in self.read.parameters():
            nn.init.zeros_(parameter)

    def enter(self, token: Tensor) -> Tensor:
        """Noisy tokens `(B, token_dim)` as the network takes them, `(B, hidden_dim)`."""
        return self.norm(self.embed(token.to(wide_dtype(self))))

    def leave(self, state: Tensor) -> Tensor:
        """What the network predicts of them, from their states `(B, hidden_dim)` after its last norm."""
        return self.read(state.to(wide_dtype(self)))

    def forward(self, token: Tensor, return_dict: bool | None = None) -> Tensor | SampleOutput | tuple[Tensor]:
        """What it would predict with no network between, `leave(enter(token))`.

        Args:
            token: `(B, token_dim)`.
            return_dict: None for the tensor itself, True for an output with `sample`, False for a tuple.
        """
        return packed(self.leave(self.enter(token)), SampleOutput, return_dict)


# The name in REG's checkpoints -> ours
_NAMES = {"cls_projectors2": "embed", "wg_norm": "norm", "final_layer.linear_cls": "read"}


def without_class_token(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """A checkpoint's own weights, and those of REG's class token, whose place is the first and has no position.

    Args:
        weights: By the names of REPA's code.

    Returns:
        The network's weights, and the state dict of its `ClassTokenHead`; None for a checkpoint without.

    Raises:
        ValueError: If the class token has a position.
    """
    names = {f"{old}.{end}": f"{new}.{end}" for old, new in _NAMES.items() for end in ("weight", "bias")}
    own = {key: value for key, value in weights.items() if key not in names}
    if names.keys() - weights.keys():
        return dict(weights), None
    if "pos_embed" in own:
        first, own["pos_embed"] = own["pos_embed"].split([1, own["pos_embed"].shape[-2] - 1], dim=-2)
        if bool((first != 0).any()):
            raise ValueError("The class token of this REG checkpoint has a position; only one without is known.")
    return own, {new: weights[old] for old, new in names.items()}


__all__ = ["ClassTokenHead", "without_class_token"]
