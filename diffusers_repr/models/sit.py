"""`SiTTransformer2DModel`: the diffusion transformer of SiT and REPA, which diffusers lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from diffusers_repr.hub.checks import check_whole
from diffusers_repr.models.conditioned import ConditionedMixin, check_conditions, check_patches
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.sit_blocks import TIME_CHANNELS, PatchAttentionMixin, SiTBlock, SiTFinalNorm, grid_positions

# Letter -> depth, width, heads.
SIZES: dict[str, tuple[int, int, int]] = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
PATCHES = (2, 4, 8)


@dataclass
class SiTOutput(Transformer2DModelOutput):
    """What `SiTTransformer2DModel` returns where it was given a class token.

    Attributes:
        sample: `(B, out_channels, H, W)`.
        class_token: State of the token after the last norm, `(B, D)`.
    """

    class_token: Tensor | None = None


class SiTTransformer2DModel(
    PatchAttentionMixin, ConditionedMixin, ReprModelMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin
):
    """Transformer on patches, conditioned by adaptive layer norm on time and a class or a vector.

    The architecture of DiT (Peebles and Xie 2022, arXiv 2212.09748) as SiT (Ma et al. 2024, arXiv 2401.08740) and REPA
    (Yu et al. 2024, arXiv 2410.06940) use it. Unlike diffusers' `DiTTransformer2DModel` it takes any height and width,
    and drops the condition once for the whole network, so it may be trained with classifier-free guidance. A new
    network gives 0 everywhere, and its blocks leave their input as it is.

    Args:
        sample_size: Height and width of x_0 in training, one number if they are equal.
        patch_size: p; a token is a patch of p x p.
        in_channels: C, channels of x_0.
        out_channels: Channels of the output; C if None.
        num_layers: Blocks.
        hidden_size: D, channels of a token, a multiple of 4 and of the heads.
        num_attention_heads: Heads of a block.
        mlp_ratio: Hidden channels of the blocks' MLPs, in multiples of D.
        num_classes: K; labels are 0 to K - 1 and K is the null class. 0: the network takes no labels.
        class_dropout_prob: In training mode, the share of samples whose condition becomes null, where the caller does
            not say which (`drop_mask`).
        condition_dim: Channels of a vector condition, such as the features of an image; None: it takes none. The null
            condition is a learned vector.
        qk_norm: Layer norm of queries and keys.
        time_divisor: The network is told `timestep / time_divisor`: 1000 for SiT, which is told t from 0 (data) to 1
            (noise), 1 for DiT.
        modulation_size: Channels of the embeddings of time, class and vector, which the blocks' modulation is made of:
            a quarter of D in l-DAE (arXiv 2401.14404); D if None.

    Raises:
        ValueError: For sizes that do not fit together.

    Example:
        >>> model = SiTTransformer2DModel(8, 2, 4, num_layers=2, hidden_size=16, num_attention_heads=2, num_classes=10)
        >>> out = model(torch.ones(2, 4, 8, 6), torch.tensor([250.0, 750.0]), class_labels=torch.tensor([3, 10]))
        >>> out.sample.shape, out.sample.abs().max().item()
        (torch.Size([2, 4, 8, 6]), 0.0)
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SiTBlock"]
    _repeated_blocks = ["SiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 12,
        hidden_size: int = 384,
        num_attention_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        condition_dim: int | None = None,
        qk_norm: bool = False,
        time_divisor: float = 1000.0,
        modulation_size: int | None = None,
    ) -> None:
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        check_patches(height, width, patch_size, hidden_size, num_attention_heads)
        check_conditions(num_classes, class_dropout_prob, time_divisor)
        self.gradient_checkpointing = False
        self.out_channels = in_channels if out_channels is None else out_channels
        self.patch_embed = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        # A formula, not a parameter: it is neither saved nor trained.
        self._grid = (height // patch_size, width // patch_size)
        self.register_buffer("positions", grid_positions(*self._grid, hidden_size), persistent=False)
        inner = hidden_size if modulation_size is None else check_whole("modulation_size", modulation_size)
        self.time_embed = TimestepEmbedding(TIME_CHANNELS, inner)
        self.label_embed = nn.Embedding(num_classes + 1, inner) if num_classes else None
        self.condition_embed = TimestepEmbedding(condition_dim, inner) if condition_dim else None
        self.null_condition = nn.Parameter(torch.empty(condition_dim)) if condition_dim else None
        self.blocks = nn.ModuleList(
            SiTBlock(hidden_size, num_attention_heads, mlp_ratio, qk_norm, inner) for _ in range(num_layers)
        )
        self.norm_out = SiTFinalNorm(hidden_size, inner)
        self.proj_out = nn.Linear(hidden_size, patch_size * patch_size * self.out_channels)
        self.reset_parameters()

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> SiTTransformer2DModel:
        """A new network of a named size.

        Args:
            size: `S`, `B`, `L` or `XL`, a slash and the patch: 2, 4 or 8.
            **overrides: Any argument of the class.

        Raises:
            ValueError: For another name.

        Example:
            >>> with torch.device("meta"):
            ...     model = SiTTransformer2DModel.from_size("XL/2", num_classes=10)
            >>> len(model.blocks), model.config.hidden_size, model.config.patch_size
            (28, 1152, 2)
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
        """Draw new weights: Xavier-uniform layers, and zeros where the condition acts and at the end."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                # A convolution over patches is a linear layer on them.
                nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            for layer in (block.attn.to_q, block.attn.to_k, block.attn.to_v):  # type: ignore[union-attr]
                # In the papers' code the three are one layer, so Xavier counts the outputs of all.
                nn.init.xavier_uniform_(layer.weight, gain=0.5**0.5)  # type: ignore[arg-type, union-attr]
            nn.init.zeros_(block.modulation.weight)  # type: ignore[arg-type, union-attr]
        for embed in (self.time_embed, self.condition_embed):
            if embed is not None:
                nn.init.normal_(embed.linear_1.weight, std=0.02)
                nn.init.normal_(embed.linear_2.weight, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        if self.null_condition is not None:
            nn.init.normal_(self.null_condition, std=0.02)
        nn.init.zeros_(self.norm_out.modulation.weight)
        nn.init.zeros_(self.proj_out.weight)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
        drop_mask: Tensor | None = None,
        class_token: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor, ...]:
        """Predict from noisy data, for flow models the velocity `alpha_dot x_0 + sigma_dot eps`.

        Args:
            hidden_states: x_t, `(B, C, H, W)`, H and W multiples of the patch.
            timestep: In the scheduler's units, a number for all or `(B,)`; may be fractional.
            class_labels: `(B,)` from 0 to `num_classes`, which is the null class; None: null for all.
            condition: `(B, condition_dim)`; None: null for all.
            drop_mask: `(B,)`, boolean: samples whose label and condition become null. None draws it in training mode
                with `class_dropout_prob`, and drops none in evaluation.
            class_token: `(B, D)`, from `ClassTokenHead.enter`: one more token, without a position, behind those of the
                image (REG, arXiv 2507.01467).
            return_dict: Whether to return an output object, else a tuple.

        Returns:
            `sample`: `(B, out_channels, H, W)`; with a class token also `class_token`, `(B, D)`, its state after the
            last norm.

        Raises:
            ValueError: For inputs of other shapes, and for a condition that the network does not take.
        """
        batch, _, height, width = self.check_input(hidden_states)
        patch = self.config["patch_size"]
        dropped = self.drop_mask(drop_mask, batch, hidden_states.device)
        temb = self._embed_time(timestep, hidden_states)
        self.refuse_conditions(class_labels, condition)
        if self.label_embed is not None:
            temb = temb + self.label_embed(self.label_ids(class_labels, dropped, batch, hidden_states.device))
        if self.condition_embed is not None:
            temb = temb + self.condition_embed(self.condition_rows(condition, dropped, batch, hidden_states.device))
        grid = (height // patch, width // patch)
        tokens = self.patch_embed(hidden_states).flatten(2).transpose(1, 2)
        tokens = tokens + self._positions(grid, tokens)
        if class_token is not None:
            tokens = torch.cat([tokens, self._token(class_token, tokens)], dim=1)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, temb)
            else:
                tokens = block(tokens, temb)
        tokens = self.norm_out(tokens, temb)
        if class_token is not None:
            tokens, state = tokens[:, :-1], tokens[:, -1]
        tokens = self.proj_out(tokens)
        # (B, h w, p p c) -> (B, c, h p, w p); lanes that share the pass may have joined the batch on the way
        patches = tokens.reshape(-1, *grid, patch, patch, self.out_channels)
        sample = patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)
        if class_token is not None:
            return SiTOutput(sample=sample, class_token=state) if return_dict else (sample, state)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _positions(self, grid: tuple[int, int], tokens: Tensor) -> Tensor:
        table = self.positions if grid == self._grid else grid_positions(*grid, tokens.shape[-1], tokens.device)
        # Under autocast the residual stream is float32, as in the papers' code. Else the dtype is that of the tokens:
        # a buffer that is not saved stays float32 where a model is loaded in half precision.
        kind = tokens.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # which has none, and would refuse to say so
        return table.to(torch.promote_types(tokens.dtype, torch.float32) if autocast else tokens.dtype)

    def _token(self, value: Tensor, tokens: Tensor) -> Tensor:
        if value.shape != (tokens.shape[0], tokens.shape[2]):
            raise ValueError(f"class_token must be {(tokens.shape[0], tokens.shape[2])}; got {tuple(value.shape)}.")
        return value.to(tokens)[:, None]

    def _embed_time(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        return self.time_embed(self.time_waves(timestep, like, TIME_CHANNELS))


__all__ = ["PATCHES", "SIZES", "SiTOutput", "SiTTransformer2DModel"]
