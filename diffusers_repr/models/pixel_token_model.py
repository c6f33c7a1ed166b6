"""`PixelTokenModel`: ADDP's student, a vision transformer that reads pixels and tells visual tokens."""

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
    places,
    reset_token_network,
    take,
    token_grid,
)


class PixelTokenModel(TokenNetworkMixin, ReprModelMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Images whose masked places are guesses, to scores of the ids in these places (ADDP, arXiv 2306.05423).

    The encoder is a vision transformer on all patches of the image and a class token; it is what recognises images
    (`encode`). In the decoder a mask token stands for the class token and for each patch that is masked, and the
    embeddings of the ids of the others are appended, with positions of their own.

    Args:
        vocab_size: V, ids of the tokenizer.
        sample_size: (H, W) of the images in pixels, one number if they are equal.
        patch_size: Pixels a token, along a side: the tokenizer's own stride.
        in_channels: Of the images.
        hidden_size: D of encoder and decoder.
        num_layers: Blocks of the encoder.
        num_attention_heads: Its heads.
        decoder_num_layers: Blocks of the decoder.
        decoder_num_attention_heads: Its heads.
        mlp_ratio: Hidden channels of the blocks' MLPs, in multiples of D.
        dropout: Of embeddings and blocks.

    Raises:
        ValueError: For sizes that do not fit together.

    Example:
        >>> sizes = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "decoder_num_layers": 1}
        >>> model = PixelTokenModel(5, 8, 4, 1, **sizes, decoder_num_attention_heads=2)
        >>> mask = torch.tensor([[True, False, True, False]])
        >>> model(torch.zeros(1, 1, 8, 8), torch.tensor([[0, 4, 2, 1]]), mask).sample.shape
        torch.Size([1, 4, 5])
    """

    _skip_layerwise_casting_patterns = ["patch_embed", "token_embed", "norm", "positions", "class_token", "mask_token"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 1024,
        sample_size: int | tuple[int, int] = 256,
        patch_size: int = 16,
        in_channels: int = 3,
        hidden_size: int = 768,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        decoder_num_layers: int = 8,
        decoder_num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, patch_size=patch_size, in_channels=in_channels)
        check_sizes(num_layers=num_layers, decoder_num_layers=decoder_num_layers)
        check_widths(hidden_size, num_attention_heads)
        check_widths(hidden_size, decoder_num_attention_heads)
        height, width = token_grid(sample_size)
        if height % patch_size or width % patch_size or not 0 <= dropout < 1:
            raise ValueError(
                f"sample_size {height} x {width} must be multiples of patch_size {patch_size}, and dropout {dropout} "
                "lie from 0 to below 1."
            )
        self.grid = (height // patch_size, width // patch_size)
        count = self.grid[0] * self.grid[1]
        self.gradient_checkpointing = False
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.positions = nn.Parameter(torch.zeros(1, 1 + count, hidden_size))
        self.norm_in = nn.LayerNorm(hidden_size, eps=EPSILON)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_attention_heads, mlp_ratio, dropout) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(hidden_size, eps=EPSILON)
        self.decoder_embed = nn.Linear(hidden_size, hidden_size)
        self.token_embed = TokenEmbedding(vocab_size, hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.decoder_positions = nn.Parameter(torch.zeros(1, 1 + count, hidden_size))
        self.masked_positions = nn.Parameter(torch.zeros(1, count, hidden_size))
        self.token_positions = nn.Parameter(torch.zeros(1, count, hidden_size))
        self.decoder_blocks = nn.ModuleList(
            TokenBlock(hidden_size, decoder_num_attention_heads, mlp_ratio, dropout) for _ in range(decoder_num_layers)
        )
        self.decoder_norm = nn.LayerNorm(hidden_size, eps=EPSILON)
        self.head = TokenHead(hidden_size, hidden_size)
        self.logit_bias = nn.Parameter(torch.zeros(vocab_size))
        reset_token_network(self)

    def forward(
        self,
        pixels: Tensor,
        token_ids: Tensor,
        mask: Tensor,
        known: Tensor | None = None,
        return_dict: bool = True,
    ) -> SampleOutput | tuple[Tensor]:
        """Scores of the ids in every place; those of masked places are what is trained.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1]: the canvas.
            token_ids: `(B, N)` or `(B, h, w)`, whole numbers; those of masked places are not read.
            mask: Of the same shape, boolean: which are masked, equally many in every sample.
            known: Places `(B, M)` of the tokens that are not masked; read from `mask` if None, which waits for the
                device.
            return_dict: Whether to return an output object, else a tuple.

        Returns:
            `sample`, logits `(B, N, V)`.

        Raises:
            ValueError: For other shapes, and samples with different numbers of masked tokens.
        """
        token_ids, mask = self._checked(token_ids), self._checked(mask)
        known = places(~mask) if known is None else known
        tokens = self.decoder_embed(self.encode(pixels)[:, 1:])
        blank = self.mask_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        at, masked_at = self.decoder_positions.to(tokens.dtype), self.masked_positions.to(tokens.dtype)
        tokens = torch.where(mask[..., None], blank + masked_at, tokens + at[:, 1:])
        ids = self.token_embed(token_ids.gather(1, known))
        ids = ids + take(self.token_positions.to(ids.dtype).expand(len(ids), -1, -1), known)
        hidden = self._run(self.decoder_blocks, torch.cat([blank + at[:, :1], tokens, ids], dim=1))
        hidden = self.head(self.decoder_norm(hidden)[:, 1 : 1 + self.num_tokens])
        logits = self.token_embed(hidden, self.config["vocab_size"]) + self.logit_bias.to(hidden.dtype)
        return SampleOutput(logits) if return_dict else (logits,)

    def encode(self, pixels: Tensor) -> Tensor:
        """Class token and patches of images, `(B, 1 + N, D)`: the representation.

        Args:
            pixels: `(B, C, H, W)` in [-1, 1].

        Raises:
            ValueError: For another shape.
        """
        patch, channels = self.config["patch_size"], self.config["in_channels"]
        shape = (channels, self.grid[0] * patch, self.grid[1] * patch)
        if tuple(pixels.shape[1:]) != shape:
            raise ValueError(f"PixelTokenModel takes images (B, {', '.join(map(str, shape))}); got {pixels.shape}.")
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        token = self.class_token.to(patches.dtype).expand(len(patches), -1, -1)
        hidden = torch.cat([token, patches], dim=1) + self.positions.to(patches.dtype)
        return self.norm(self._run(self.blocks, self.drop(self.norm_in(hidden))))


__all__ = ["PixelTokenModel"]
