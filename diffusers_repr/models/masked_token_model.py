"""`MaskedTokenModel`: MAGE's encoder-decoder transformer, which tells masked visual tokens from the others."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from torch import Tensor, nn

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.outputs import SampleOutput
from diffusers_repr.models.token_blocks import (
    EPSILON,
    TokenBlock,
    TokenEmbedding,
    TokenHead,
    TokenNetworkMixin,
    check_widths,
    reset_token_network,
    take,
    token_grid,
)
from diffusers_repr.models.vector_embedding import VectorEmbedding


class MaskedTokenModel(TokenNetworkMixin, ReprModelMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Token ids, some of them masked, to scores of every id in every place (MAGE, Li et al. 2022, arXiv 2211.09117).

    The encoder reads a class token and the tokens, of which a part may be left out (`kept`); in the decoder the
    encoder's class token stands in every place that is masked or was left out. With `condition_dim` a vector takes the
    class token's place behind the embeddings' norm, as in RCG (arXiv 2312.03701), with a learned null vector.

    Two ids follow those of the vocabulary: the class token's and the mask's.

    Args:
        vocab_size: V, ids of the tokenizer.
        sample_size: (h, w) of the tokens of an image, one number if they are equal.
        hidden_size: D of the encoder.
        num_layers: Its blocks.
        num_attention_heads: Its heads.
        decoder_hidden_size: Of the decoder; that of the encoder if None.
        decoder_num_layers: Its blocks.
        decoder_num_attention_heads: Its heads.
        mlp_ratio: Hidden channels of the blocks' MLPs, in multiples of their width.
        dropout: Of embeddings and blocks.
        condition_dim: Width of the vectors it is conditioned on; 0: of none.

    Raises:
        ValueError: For sizes that do not fit together.

    Example:
        >>> sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "decoder_num_layers": 1}
        >>> model = MaskedTokenModel(5, 2, **sizes, decoder_num_attention_heads=2)
        >>> model(torch.tensor([[0, 4, 2, model.mask_token_id]])).sample.shape
        torch.Size([1, 4, 5])
    """

    _skip_layerwise_casting_patterns = ["token_embed", "norm", "positions", "condition_embed"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 1024,
        sample_size: int | tuple[int, int] = 16,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        decoder_hidden_size: int | None = None,
        decoder_num_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        condition_dim: int = 0,
    ) -> None:
        super().__init__()
        inner = decoder_hidden_size or hidden_size
        check_sizes(vocab_size=vocab_size, num_layers=num_layers, decoder_num_layers=decoder_num_layers)
        check_widths(hidden_size, num_attention_heads)
        check_widths(inner, decoder_num_attention_heads, "decoder_hidden_size")
        if condition_dim < 0 or not 0 <= dropout < 1:
            raise ValueError(f"condition_dim is 0 or more, dropout from 0 to below 1; got {condition_dim}, {dropout}.")
        self.grid = token_grid(sample_size)
        count = self.grid[0] * self.grid[1] + 1
        self.gradient_checkpointing = False
        self.token_embed = TokenEmbedding(vocab_size + 2, hidden_size)
        self.positions = nn.Parameter(torch.zeros(1, count, hidden_size))
        self.norm_in = nn.LayerNorm(hidden_size, eps=EPSILON)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_attention_heads, mlp_ratio, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=EPSILON)
        self.decoder_embed = nn.Linear(hidden_size, inner)
        self.decoder_positions = nn.Parameter(torch.zeros(1, count, inner))
        self.decoder_blocks = nn.ModuleList(
            TokenBlock(inner, decoder_num_attention_heads, mlp_ratio, dropout) for _ in range(decoder_num_layers)
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=EPSILON)
        self.head = TokenHead(inner, hidden_size)
        self.logit_bias = nn.Parameter(torch.zeros(vocab_size))
        self.condition_embed = VectorEmbedding(condition_dim, hidden_size) if condition_dim else None
        reset_token_network(self)

    @property
    def class_token_id(self) -> int:
        """Id of the class token."""
        return self.config["vocab_size"]

    @property
    def mask_token_id(self) -> int:
        """Id of a masked token."""
        return self.config["vocab_size"] + 1

    def forward(
        self,
        token_ids: Tensor,
        condition: Tensor | None = None,
        drop_mask: Tensor | None = None,
        kept: Tensor | None = None,
        return_dict: bool = True,
    ) -> SampleOutput | tuple[Tensor]:
        """Scores of the ids in every place.

        Args:
            token_ids: `(B, N)` or `(B, h, w)`, whole numbers; `mask_token_id` where a token is masked.
            condition: Vectors `(B, condition_dim)`; None: the null vector.
            drop_mask: `(B,)`, boolean: samples that get the null vector.
            kept: Places `(B, M)` that the encoder sees; None: all.
            return_dict: Whether to return an output object, else a tuple.

        Returns:
            `sample`, logits `(B, N, V)`.

        Raises:
            ValueError: For another number of tokens, and vectors of another width or without an input for them.
        """
        token_ids = self._checked(token_ids)
        encoded = self.decoder_embed(self.encode(token_ids, condition, drop_mask, kept))
        token, tokens = encoded[:, :1], encoded[:, 1:]
        if kept is not None:
            left_out = token.expand(-1, token_ids.shape[1], -1)
            tokens = left_out.scatter(1, kept[..., None].expand(-1, -1, tokens.shape[2]), tokens)
        tokens = torch.where(token_ids.eq(self.mask_token_id)[..., None], token, tokens)
        hidden = torch.cat([token, tokens], dim=1) + self.decoder_positions.to(tokens.dtype)
        hidden = self._run(self.decoder_blocks, hidden)
        logits = self.token_embed(self.head(self.decoder_norm(hidden)[:, 1:]), self.config["vocab_size"])
        logits = logits + self.logit_bias.to(logits.dtype)
        return SampleOutput(logits) if return_dict else (logits,)

    def encode(
        self,
        token_ids: Tensor,
        condition: Tensor | None = None,
        drop_mask: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> Tensor:
        """What the encoder makes of class token and tokens, `(B, 1 + N, D)`; with `kept`, `(B, 1 + M, D)`.

        Args:
            token_ids: As `forward`.
            condition: As `forward`.
            drop_mask: As `forward`.
            kept: As `forward`.

        Raises:
            ValueError: As `forward`.
        """
        token_ids = self._checked(token_ids)
        first = torch.full_like(token_ids[:, :1], self.class_token_id)
        hidden = self.token_embed(torch.cat([first, token_ids], dim=1))
        hidden = self.drop(self.norm_in(hidden + self.positions.to(hidden.dtype)))
        token, tokens = hidden[:, :1], hidden[:, 1:]
        if kept is not None:
            tokens = take(tokens, kept)
        vector = self._vector(condition, drop_mask, token)
        hidden = torch.cat([token if vector is None else vector[:, None], tokens], dim=1)
        return self.norm(self._run(self.blocks, hidden))

    def _vector(self, condition: Tensor | None, drop_mask: Tensor | None, like: Tensor) -> Tensor | None:
        """What stands for the class token, `(B, D)`; None in a network without vectors."""
        if self.condition_embed is None:
            if condition is not None:
                raise ValueError("This MaskedTokenModel takes no vectors (condition_dim=0); leave condition out.")
            return None
        if condition is None:
            condition = like.new_zeros(len(like), self.config["condition_dim"])
            drop_mask = torch.ones(len(like), dtype=torch.bool, device=like.device)
        return self.condition_embed(condition.to(like.dtype), drop_mask)


__all__ = ["MaskedTokenModel"]
