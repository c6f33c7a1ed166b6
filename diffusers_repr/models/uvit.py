"""`UViTTransformer2DModel`: the diffusion transformer of U-ViT, with long skips and all inputs as tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.models.conditioned import ConditionedMixin, check_conditions, check_patches
from diffusers_repr.models.joint_vit import unpatchify
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.sit_blocks import PatchAttentionMixin
from diffusers_repr.models.uvit_blocks import UViTBlock

# Letter -> blocks, width, heads (Bao et al. 2022, table 1).
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (13, 512, 8),
    "S-deep": (17, 512, 8),
    "M": (17, 768, 12),
    "L": (21, 1024, 16),
    "H": (29, 1152, 16),
}
PATCHES = (2, 4, 8)


class UViTTransformer2DModel(
    PatchAttentionMixin, ConditionedMixin, ReprModelMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin
):
    """Transformer on patches that takes time and condition as tokens and joins shallow with deep blocks.

    The network of U-ViT (Bao et al. 2022, arXiv 2209.12152), which is not the `UVit2DModel` of diffusers (aMUSEd). Of
    2 n + 1 blocks, what block i < n gives is concatenated to the input of block 2 n - i and brought to its width by a
    linear layer. Positions are learned; a 3 x 3 convolution comes last. The sequence is class token, time, class,
    vector, text, image, each where the network has it.

    Args:
        sample_size: Height and width of x_0 in training, one number if they are equal; other sizes get positions
            between those that were learned.
        patch_size: p; a token is a patch of p x p.
        in_channels: Channels of x_t, with those of a map beside it.
        out_channels: Channels of the output; as many as the input if None.
        num_layers: Blocks, an odd number (the papers' code calls one less `depth`).
        hidden_size: D, channels of a token, a multiple of 4 and of the heads.
        num_attention_heads: Heads of a block.
        mlp_ratio: Hidden channels of the blocks' MLPs, in multiples of D.
        attention_bias: Whether queries, keys and values have biases.
        num_classes: K; labels are 0 to K - 1 and K is the null class. 0: the network takes no labels.
        class_dropout_prob: In training mode, the share of samples whose label and vector become null, where the caller
            does not say which (`drop_mask`).
        condition_dim: Channels of a vector condition, which enters by a linear layer; None: it takes none. The null
            condition is a learned vector.
        text_dim: Channels of text tokens, which enter by a linear layer; None: it takes none.
        text_tokens: How many text tokens there are.
        class_token: Whether a learned token stands first, whose state tells of the whole image (online guidance).
        time_mlp: Whether the sines and cosines of the time go through two layers; the published networks take them
            as they are.
        time_divisor: The network is told `timestep / time_divisor + time_offset`.
        time_offset: See `time_divisor`; 1 of the published networks with the noise schedule of Stable Diffusion.
        final_conv: Whether the output goes through a 3 x 3 convolution.

    Raises:
        ValueError: For sizes that do not fit together.

    Example:
        >>> model = UViTTransformer2DModel(8, 2, 4, num_layers=3, hidden_size=16, num_attention_heads=2, num_classes=5)
        >>> model(torch.ones(2, 4, 8, 6), torch.tensor([250.0, 750.0]), class_labels=torch.tensor([3, 5])).sample.shape
        torch.Size([2, 4, 8, 6])
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["UViTBlock"]
    _repeated_blocks = ["UViTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "positions", "class_token_embed"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 13,
        hidden_size: int = 512,
        num_attention_heads: int = 8,
        mlp_ratio: float = 4.0,
        attention_bias: bool = False,
        num_classes: int = 0,
        class_dropout_prob: float = 0.1,
        condition_dim: int | None = None,
        text_dim: int | None = None,
        text_tokens: int = 77,
        class_token: bool = False,
        time_mlp: bool = False,
        time_divisor: float = 1.0,
        time_offset: float = 0.0,
        final_conv: bool = True,
    ) -> None:
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        check_patches(height, width, patch_size, hidden_size, num_attention_heads)
        check_conditions(num_classes, class_dropout_prob, time_divisor)
        if num_layers < 1 or num_layers % 2 == 0 or text_tokens < 1:
            raise ValueError(
                "num_layers is odd, one block in the middle of as many on both sides, and text_tokens at least 1; "
                f"got {num_layers} and {text_tokens}."
            )
        self.gradient_checkpointing = False
        self.out_channels = in_channels if out_channels is None else out_channels
        self._grid = (height // patch_size, width // patch_size)
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.class_token_embed = nn.Parameter(torch.empty(1, 1, hidden_size)) if class_token else None
        self.time_embed = TimestepEmbedding(hidden_size, 4 * hidden_size, out_dim=hidden_size) if time_mlp else None
        self.label_embed = nn.Embedding(num_classes + 1, hidden_size) if num_classes else None
        self.condition_embed = nn.Linear(condition_dim, hidden_size) if condition_dim else None
        self.null_condition = nn.Parameter(torch.empty(condition_dim)) if condition_dim else None
        self.text_embed = nn.Linear(text_dim, hidden_size) if text_dim else None
        self.positions = nn.Parameter(
            torch.empty(1, first_image_token(self.config) + self._grid[0] * self._grid[1], hidden_size)
        )
        half = num_layers // 2
        self.blocks = nn.ModuleList(
            UViTBlock(hidden_size, num_attention_heads, mlp_ratio, attention_bias, skip=at > half)
            for at in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * self.out_channels)
        self.conv_out = nn.Conv2d(self.out_channels, self.out_channels, 3, padding=1) if final_conv else None
        self.reset_parameters()

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> UViTTransformer2DModel:
        """A new network of a named size.

        Args:
            size: `S`, `S-deep`, `M`, `L` or `H`, a slash and the patch: 2, 4 or 8.
            **overrides: Any argument of the class.

        Raises:
            ValueError: For another name.

        Example:
            >>> with torch.device("meta"):
            ...     model = UViTTransformer2DModel.from_size("L/2", num_classes=10)
            >>> len(model.blocks), model.config.hidden_size, model.config.patch_size
            (21, 1024, 2)
        """
        letter, _, patch = size.partition("/")
        if letter not in SIZES or patch not in map(str, PATCHES):
            names = ", ".join(f"{letter}/{patch}" for letter in SIZES for patch in PATCHES)
            raise ValueError(f"No size {size!r}; known: {names}.")
        depth, width, heads = SIZES[letter]
        named = {
            "patch_size": int(patch),
            "num_layers": depth,
            "hidden_size": width,
            "num_attention_heads": heads,
        }
        return cls(**{**named, **overrides})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights: linear layers, tokens and positions normal of 0.02, cut at 2."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for parameter in (self.positions, self.class_token_embed, self.null_condition):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        drop_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Predict from noisy data.

        Args:
            hidden_states: x_t, `(B, C, H, W)`, H and W multiples of the patch.
            timestep: In the scheduler's units, a number for all or `(B,)`; may be fractional.
            class_labels: `(B,)` from 0 to `num_classes`, which is the null class; None: null for all.
            condition: `(B, condition_dim)`; None: null for all.
            encoder_hidden_states: Text tokens `(B, text_tokens, text_dim)` of a network with text. The null text is
                the caller's, as of any text model.
            drop_mask: `(B,)`, boolean: samples whose label and vector become null. None draws it in training mode
                with `class_dropout_prob`, and drops none in evaluation.
            return_dict: Whether to return an output object, else a tuple.

        Returns:
            `sample`: `(B, out_channels, H, W)`.

        Raises:
            ValueError: For inputs of other shapes, and for a condition that the network does not take.
        """
        _, _, height, width = self.check_input(hidden_states)
        patch = self.config["patch_size"]
        grid = (height // patch, width // patch)
        front = self._front(hidden_states, timestep, class_labels, condition, encoder_hidden_states, drop_mask)
        image = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)
        tokens = torch.cat([*front, image], dim=1)
        tokens = tokens + self._positions(grid, tokens)
        half = len(self.blocks) // 2
        skips: list[Tensor] = []
        for at, block in enumerate(self.blocks):
            given = (tokens, skips.pop()) if at > half else (tokens,)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, *given)
            else:
                tokens = block(*given)
            if at < half:
                skips.append(tokens)
        tokens = self.proj_out(self.norm_out(tokens))
        sample = unpatchify(tokens[:, -grid[0] * grid[1] :], grid, patch)
        if self.conv_out is not None:
            sample = self.conv_out(sample)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _front(
        self,
        x_t: Tensor,
        timestep: Tensor | float,
        labels: Tensor | None,
        condition: Tensor | None,
        text: Tensor | None,
        mask: Tensor | None,
    ) -> list[Tensor]:
        """What stands before the image's tokens, each `(B, n, D)`."""
        batch, device = len(x_t), x_t.device
        dropped = self.drop_mask(mask, batch, device)
        self.refuse_conditions(labels, condition)
        time = self.time_waves(timestep, x_t, self.config["hidden_size"])
        front = [] if self.class_token_embed is None else [self.class_token_embed.expand(batch, -1, -1)]
        front.append((time if self.time_embed is None else self.time_embed(time))[:, None])
        if self.label_embed is not None:
            front.append(self.label_embed(self.label_ids(labels, dropped, batch, device))[:, None])
        if self.condition_embed is not None:
            front.append(self.condition_embed(self.condition_rows(condition, dropped, batch, device))[:, None])
        if self.text_embed is not None:
            front.append(self.text_embed(self._text(text, batch)))
        elif text is not None:
            raise ValueError("This UViTTransformer2DModel takes no text (text_dim=None); drop encoder_hidden_states.")
        return front

    def _text(self, text: Tensor | None, batch: int) -> Tensor:
        wanted = (batch, self.config["text_tokens"], self.config["text_dim"])
        if text is None or text.shape != wanted:
            found = None if text is None else tuple(text.shape)
            raise ValueError(f"This UViTTransformer2DModel takes encoder_hidden_states {wanted}; got {found}.")
        return text

    def _positions(self, grid: tuple[int, int], tokens: Tensor) -> Tensor:
        """Learned positions, interpolated for another grid than that of training."""
        table: Tensor = self.positions
        if grid != self._grid:
            first = first_image_token(self.config)
            places = table[:, first:].unflatten(1, self._grid).permute(0, 3, 1, 2)
            places = functional.interpolate(places.float(), grid, mode="bicubic", align_corners=False)
            table = torch.cat([table[:, :first], places.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)
        # Under autocast the residual stream is float32, as in the paper's code.
        kind = tokens.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        return table if autocast else table.to(tokens.dtype)


def first_image_token(config: Any) -> int:
    """Place of the image's first token in the sequence of a network with this config.

    Example:
        >>> first_image_token({"class_token": True, "num_classes": 10, "condition_dim": None, "text_dim": None})
        3
    """
    text = config["text_tokens"] if config["text_dim"] else 0
    return 1 + bool(config["class_token"]) + bool(config["num_classes"]) + bool(config["condition_dim"]) + text


__all__ = ["PATCHES", "SIZES", "UViTTransformer2DModel", "first_image_token"]
