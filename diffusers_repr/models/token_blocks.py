"""Parts of the networks of visual tokens: the block, embeddings that are also the last layer, places among tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.models.sit_blocks import SiTAttnProcessor

EPSILON = 1e-6  # of layer norms, as in MAGE's code


class TokenBlock(nn.Module):
    """`h += Attn(LN(h))`, then `h += MLP(LN(h))`, with dropout of the probabilities and of both branches.

    Args:
        dim: D, channels of a token.
        num_attention_heads: Heads of `D / num_attention_heads` channels.
        mlp_ratio: Hidden channels of the MLP, in multiples of D.
        dropout: Of attention probabilities, of hidden channels and of what is added.
    """

    def __init__(self, dim: int, num_attention_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPSILON)
        self.attn = Attention(
            dim,
            heads=num_attention_heads,
            dim_head=dim // num_attention_heads,
            bias=True,
            dropout=dropout,
            processor=SiTAttnProcessor(dropout),
        )
        self.norm2 = nn.LayerNorm(dim, eps=EPSILON)
        self.ff = FeedForward(
            dim, activation_fn="gelu", inner_dim=int(dim * mlp_ratio), dropout=dropout, final_dropout=True
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Tokens `(B, N, D)`, of the same shape."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class TokenNetworkMixin:
    """What networks of a grid of tokens share: their number, blocks that are run in turn, the shape of ids.

    Attributes:
        grid: (h, w), in tokens.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TokenBlock"]
    _repeated_blocks = ["TokenBlock"]
    grid: tuple[int, int]
    gradient_checkpointing: bool

    @property
    def num_tokens(self) -> int:
        """N, tokens of an image."""
        return self.grid[0] * self.grid[1]

    def _run(self: Any, blocks: Any, hidden: Tensor) -> Tensor:
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden = self._gradient_checkpointing_func(block, hidden)
            else:
                hidden = block(hidden)
        return hidden

    def _checked(self, values: Tensor) -> Tensor:
        """Ids, or a mask, as `(B, N)`."""
        flat = values.flatten(1)
        if flat.shape[1] != self.num_tokens or values.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes ids of {self.grid[0]} x {self.grid[1]} tokens, whole numbers (B, "
                f"{self.num_tokens}), and masks of that shape; got {tuple(values.shape)}, {values.dtype}."
            )
        return flat


class TokenEmbedding(nn.Embedding):
    """Ids to vectors, and vectors to scores of the first ids: both inside the layer's own call.

    Layerwise casting and offloading bring weights to a layer when it is called; a product with `weight` from outside
    would find them elsewhere.
    """

    def forward(self, value: Tensor, scored: int | None = None) -> Tensor:
        """Vectors `(..., D)` of ids `(...)`; with `scored` instead the scores `(..., scored)` of vectors `(..., D)`.

        Scores give no gradient to the table: it is trained as what is read, as in MAGE's code.
        """
        if scored is None:
            return super().forward(value)
        return functional.linear(value, self.weight[:scored].detach().to(value.dtype))


class TokenHead(nn.Module):
    """`LN(gelu(W h))`, which is then scored against the embeddings of the ids.

    Args:
        dim: Channels that enter.
        embedding_dim: Channels of the embeddings.
    """

    def __init__(self, dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(B, N, embedding_dim)` of tokens `(B, N, dim)`."""
        return self.norm(functional.gelu(self.proj(hidden_states)))


def token_grid(size: int | tuple[int, int] | list[int], name: str = "sample_size") -> tuple[int, int]:
    """(h, w) of a size in tokens, one number if they are equal.

    Raises:
        ValueError: For sizes below 1.
    """
    grid = (size, size) if isinstance(size, int) else tuple(size)
    if len(grid) != 2 or min(grid) < 1:
        raise ValueError(f"{name} is one side or (height, width), 1 or more; got {size!r}.")
    return grid


def check_widths(hidden_size: int, num_attention_heads: int, name: str = "hidden_size") -> None:
    """Raise ValueError unless the heads divide the channels."""
    if num_attention_heads < 1 or hidden_size < 1 or hidden_size % num_attention_heads:
        raise ValueError(f"{name} {hidden_size} must be a multiple of its heads, {num_attention_heads}.")


def places(mask: Tensor) -> Tensor:
    """Columns of the True entries of each row, in their order, `(B, M)`.

    Args:
        mask: `(B, N)`, boolean, with M True entries in every row.

    Raises:
        ValueError: If rows have different numbers of them: they are joined into one tensor.

    Example:
        >>> places(torch.tensor([[True, False, True], [False, True, True]])).tolist()
        [[0, 2], [1, 2]]
    """
    found = mask.nonzero()[:, 1]
    if len(mask) and (len(found) % len(mask) or bool((mask.sum(1) != len(found) // len(mask)).any())):
        raise ValueError(f"Rows of a batch must have equally many tokens of a kind; got {mask.sum(1).tolist()}.")
    return found.view(len(mask), -1)


def take(tokens: Tensor, at: Tensor) -> Tensor:
    """Tokens `(B, N, D)` at places `(B, M)`: `(B, M, D)`."""
    return tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[2]))


def reset_token_network(model: nn.Module) -> None:
    """Draw the weights of a new network as MAGE's code does: Xavier uniform layers without biases, embeddings 0.02."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for name, parameter in model.named_parameters(recurse=False):
        if name != "logit_bias":
            nn.init.normal_(parameter, std=0.02)


__all__ = [
    "EPSILON",
    "TokenBlock",
    "TokenEmbedding",
    "TokenHead",
    "TokenNetworkMixin",
    "check_widths",
    "places",
    "reset_token_network",
    "take",
    "token_grid",
]
