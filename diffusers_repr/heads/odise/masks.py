"""`MaskGenerator`: masks of queries from a feature pyramid, by the two halves of transformers' Mask2Former."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerPixelDecoder,
    Mask2FormerPreTrainedModel,
    Mask2FormerTransformerModule,
)

from diffusers_repr.hub.checks import check_sizes


@dataclass(frozen=True, eq=False)
class QueryMasks:
    """What the queries became, layer by layer, the last one last.

    Attributes:
        queries: `(B, Q, width)` each, normalised.
        masks: Logits `(B, Q, h, w)` each, at the finest stride of the pyramid.
        features: `(B, width, h, w)`, whose products with the queries' embeddings the masks are.
    """

    queries: list[Tensor]
    masks: list[Tensor]
    features: Tensor


class MaskGenerator(Mask2FormerPreTrainedModel):
    """Mask2Former (Cheng et al. 2022, arXiv 2112.01527) without a backbone: its pixel and its transformer decoder.

    Both are transformers' own modules, and each takes feature maps as they are; they start as its models do.

    Args:
        channels: Of each level of the pyramid, finest first.
        strides: Of each level, each twice the one before.
        width: Channels inside, a multiple of 32 and of 2 `heads`.
        queries: How many masks an image has at most.
        encoder_layers: Of the pixel decoder, deformable attention over the three coarsest levels.
        decoder_layers: Of the transformer decoder.
        heads: Of all attentions.
        encoder_feedforward: Width of the pixel decoder's feed-forward layers.
        decoder_feedforward: Width of the transformer decoder's.

    Raises:
        ValueError: For widths that do not suit, fewer than three levels, and strides that do not double.

    Example:
        >>> import torch
        >>> made = MaskGenerator([8] * 3, [4, 8, 16], 32, 5, 1, 2, 2, 16, 16)
        >>> found = made([torch.zeros(1, 8, 16 // s, 16 // s) for s in (1, 2, 4)])
        >>> len(found.masks), found.masks[-1].shape, found.queries[-1].shape
        (3, torch.Size([1, 5, 16, 16]), torch.Size([1, 5, 32]))
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        width: int = 256,
        queries: int = 100,
        encoder_layers: int = 6,
        decoder_layers: int = 9,
        heads: int = 8,
        encoder_feedforward: int = 1024,
        decoder_feedforward: int = 2048,
    ) -> None:
        check_sizes(
            width=width, queries=queries, encoder_layers=encoder_layers, decoder_layers=decoder_layers, heads=heads,
            encoder_feedforward=encoder_feedforward, decoder_feedforward=decoder_feedforward,
        )  # fmt: skip
        if width % 32 or width % (2 * heads):
            raise ValueError(f"width must be a multiple of 32, and of twice the {heads} heads; got {width}.")
        if (
            len(channels) != len(strides)
            or len(strides) < 3
            or any(b != 2 * a for a, b in zip(strides, strides[1:], strict=False))
        ):
            raise ValueError(f"Three or more levels are needed, each twice as coarse; got strides {list(strides)}.")
        config = Mask2FormerConfig(
            feature_size=width, mask_feature_size=width, hidden_dim=width, num_queries=queries,
            encoder_layers=encoder_layers,
            decoder_layers=decoder_layers + 1,  # it counts the prediction before the first layer
            num_attention_heads=heads, encoder_feedforward_dim=encoder_feedforward,
            dim_feedforward=decoder_feedforward, feature_strides=list(strides), common_stride=strides[0],
        )  # fmt: skip
        super().__init__(config)
        self.pixel_decoder = Mask2FormerPixelDecoder(config, feature_channels=list(channels))
        self.transformer = Mask2FormerTransformerModule(in_features=width, config=config)
        self.post_init()

    def forward(self, levels: Sequence[Tensor]) -> QueryMasks:
        """Of a pyramid's levels `(B, channels, h, w)`, finest first."""
        pixels = self.pixel_decoder(list(levels))
        found = self.transformer(pixels.multi_scale_features, pixels.mask_features)
        queries = [states.transpose(0, 1) for states in found.intermediate_hidden_states]
        return QueryMasks(queries, list(found.masks_queries_logits), pixels.mask_features)


__all__ = ["MaskGenerator", "QueryMasks"]
