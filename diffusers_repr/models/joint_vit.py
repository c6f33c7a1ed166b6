"""`JointViTModel`: one plain vision transformer that classifies clean images and denoises noisy ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.models.labels import label_names, named_ids
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.sit_blocks import SiTAttnProcessor

MODULATIONS = ("token", "channel")
FORMS = ("hybvit", "early")


@dataclass
class JointViTOutput(BaseOutput):
    """What `JointViTModel` gives.

    Attributes:
        sample: The prediction of the denoiser, `(B, C, H, W)`.
        logits: Of the classes, `(B, K)`; None for a network without classes.
    """

    sample: Tensor
    logits: Tensor | None = None


class JointViTModel(ReprModelMixin, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """Pre-norm vision transformer with a class token, told the noise level or not.

    The network of HybViT (Yang et al. 2022, arXiv 2208.07791) as its code has it, and without classes that of GenViT.
    With a timestep the tokens are scaled and shifted before the attention and before the MLP of each block, on the
    residual stream: `x (1 + s) + b`. Without one, for clean images, that path is left out and the network is an
    ordinary ViT.

    A folder that was saved before `form` was an argument holds an `early` network, and loads as one.

    Args:
        sample_size: Height and width of x_0, one number if they are equal.
        patch_size: p; a token is a patch of p x p.
        in_channels: C, channels of x_0.
        num_layers: Blocks.
        hidden_size: D, channels of a token, a multiple of the heads.
        num_attention_heads: Heads of a block.
        mlp_ratio: Hidden channels of the blocks' MLPs, in multiples of D.
        num_classes: K; 0 leaves the classifier out.
        modulation: `token`, the paper's: one s and one b for each token, shared by all channels, whose layers grow
            with the square of the number of tokens and fix the size of the input; `channel`: one for each channel,
            as in adaptive layer norm, for inputs of any size.
        modulate_mlp: The same s and b once more before each MLP, as in all commands of the paper's code.
        dropout: In the blocks.
        id2label: Name of each class id, or the names in the order of the ids.
        form: `hybvit`, the network of the paper's code: sines and cosines of the time as wide as a token, GELU between
            the time's two layers, no biases of queries, keys and values, Xavier's normal weights. `early`, what this
            class was at first, for networks trained then: as many sines and cosines as tokens (with few tokens
            distant times look alike), SiLU, biases, modulation that starts at zero.

    Raises:
        ValueError: For sizes that do not fit together.

    Example:
        >>> model = JointViTModel((8, 4), 2, 1, num_layers=2, hidden_size=16, num_attention_heads=2, num_classes=3)
        >>> out = model(torch.ones(2, 1, 8, 4), torch.tensor([3, 900]))
        >>> out.sample.shape, out.logits.shape
        (torch.Size([2, 1, 8, 4]), torch.Size([2, 3]))
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["JointViTBlock"]
    _repeated_blocks = ["JointViTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", "positions", "class_token"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_channels: int = 3,
        num_layers: int = 9,
        hidden_size: int = 384,
        num_attention_heads: int = 12,
        mlp_ratio: float = 2.0,
        num_classes: int = 10,
        modulation: str = "token",
        modulate_mlp: bool = True,
        dropout: float = 0.0,
        id2label: Mapping[Any, str] | Sequence[str] | None = None,
        form: str = "hybvit",
    ) -> None:
        super().__init__()
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
        if height % patch_size or width % patch_size or hidden_size % num_attention_heads:
            raise ValueError(
                f"sample_size {height} x {width} must be multiples of patch_size {patch_size}, and hidden_size "
                f"{hidden_size} of num_attention_heads {num_attention_heads}."
            )
        if form not in FORMS or (form == "hybvit" and hidden_size < 4):
            raise ValueError(
                f"form is one of {', '.join(FORMS)}, and hybvit has a hidden_size of at least 4; got {form!r} and "
                f"{hidden_size}."
            )
        if modulation not in MODULATIONS or num_classes < 0:
            raise ValueError(
                f"modulation is one of {', '.join(MODULATIONS)} and num_classes at least 0; got {modulation!r} and "
                f"{num_classes}."
            )
        self.register_to_config(id2label=named_ids(id2label, num_classes))
        self.gradient_checkpointing = False
        self._grid = (height // patch_size, width // patch_size)
        tokens = self._grid[0] * self._grid[1] + 1
        modulated = tokens if modulation == "token" else hidden_size
        self._waves = modulated if form == "early" else hidden_size
        inner = 4 * tokens if modulation == "token" else hidden_size
        patch = patch_size * patch_size * in_channels
        self.patch_embed = nn.Linear(patch, hidden_size)
        self.class_token = nn.Parameter(torch.randn(1, 1, hidden_size))
        self.positions = nn.Parameter(torch.randn(1, tokens, hidden_size))
        self.time_embed = TimestepEmbedding(self._waves, inner, act_fn="silu" if form == "early" else "gelu")
        self.blocks = nn.ModuleList(
            JointViTBlock(
                hidden_size,
                num_attention_heads,
                mlp_ratio,
                inner,
                modulated,
                modulation,
                modulate_mlp,
                dropout,
                attention_bias=form == "early",
            )
            for _ in range(num_layers)
        )
        self.classifier = (
            nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, num_classes)) if num_classes else None
        )
        self.proj_out = nn.Linear(hidden_size, patch)
        if form == "hybvit":
            self.reset_parameters()

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """As in the base; a saved config without `form` is that of an `early` network.

        Args:
            config_dict: A config; a saved one names its class.
            **kwargs: What overrides it.
        """
        if "_class_name" in config_dict and "form" not in config_dict:
            config_dict = {"modulate_mlp": False, **config_dict, "form": "early"}
        return super().extract_init_dict(config_dict, **kwargs)

    def reset_parameters(self) -> None:
        """Draw the weights of a new network of the form `hybvit`; positions and class token stay as they are."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if name.endswith((".to_q", ".to_k", ".to_v")):
                # The paper's code has the three as one matrix (3 D, D), whose Xavier's normal is narrower.
                nn.init.normal_(module.weight, std=math.sqrt(2 / (4 * module.in_features)))
            else:
                nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def labels(self) -> list[str]:
        """Name of each class, in the order of the ids; the ids as text where none were given."""
        return label_names(self.config)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float | None = None, return_dict: bool = True
    ) -> JointViTOutput | tuple[Tensor, Tensor | None]:
        """Denoise and classify at once.

        Args:
            hidden_states: x_t, `(B, C, H, W)`, or clean images.
            timestep: Training timestep, a number for all or `(B,)`, may be fractional; None for clean images: no
                part of the time path is used.
            return_dict: Whether to return an output object, else a tuple.

        Returns:
            `sample` `(B, C, H, W)` and `logits` `(B, K)`.

        Raises:
            ValueError: For inputs of other shapes.
        """
        grid = self._check_input(hidden_states)
        patch = self.config["patch_size"]
        temb = None if timestep is None else self._embed_time(timestep, hidden_states)
        tokens = self.patch_embed(patchify(hidden_states, patch))
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        tokens = tokens + self._positions(grid).to(tokens.dtype)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, temb)
            else:
                tokens = block(tokens, temb)
        logits = None if self.classifier is None else self.classifier(tokens[:, 0])
        sample = unpatchify(self.proj_out(tokens[:, 1:]), grid, patch)
        return JointViTOutput(sample, logits) if return_dict else (sample, logits)

    def _check_input(self, value: Tensor) -> tuple[int, int]:
        channels, patch = self.config["in_channels"], self.config["patch_size"]
        wrong = value.ndim != 4 or value.shape[1] != channels or value.shape[2] % patch or value.shape[3] % patch
        grid = (0, 0) if wrong else (value.shape[2] // patch, value.shape[3] // patch)
        if wrong or (grid != self._grid and self.config["modulation"] == "token"):
            height, width = (patch * side for side in self._grid)
            only = f"{height}, {width}); modulation='channel' takes other sizes" if not wrong else "H, W)"
            raise ValueError(f"JointViTModel takes x_t (B, {channels}, {only}; got {tuple(value.shape)}.")
        return grid

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Learned positions, interpolated for another grid than that of training."""
        if grid == self._grid:
            return self.positions
        places = self.positions[:, 1:].unflatten(1, self._grid).permute(0, 3, 1, 2)
        places = functional.interpolate(places.float(), grid, mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], places.flatten(2).transpose(1, 2).to(self.positions.dtype)], dim=1)

    def _embed_time(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        times = torch.as_tensor(timestep, device=like.device).reshape(-1)
        if times.shape[0] not in (1, like.shape[0]):
            raise ValueError(
                f"{times.shape[0]} timesteps for {like.shape[0]} samples; pass one for all, or one for each."
            )
        # Half precision cannot tell neighbouring timesteps apart.
        times = times.to(torch.promote_types(times.dtype, torch.float32)).expand(like.shape[0])
        early = self.config["form"] == "early"
        waves = get_timestep_embedding(
            times, self._waves, flip_sin_to_cos=early, downscale_freq_shift=0 if early else 1
        )
        return self.time_embed(waves.to(like.dtype))


class JointViTBlock(nn.Module):
    """`x = m(x); x += Attn(LN(x)); x = m(x); x += MLP(LN(x))`, where m scales and shifts the stream by the time.

    m starts as the identity; the form `hybvit` of the network draws its weights anew.

    Args:
        dim: D.
        num_attention_heads: Heads of `D / num_attention_heads` channels.
        mlp_ratio: Hidden channels of the MLP, in multiples of D.
        time_channels: Of the time embedding.
        modulated: Scales: one a token or one a channel.
        modulation: Which of them.
        modulate_mlp: m acts before the MLP too.
        dropout: Of the residual branches.
        attention_bias: Whether queries, keys and values have biases.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        mlp_ratio: float,
        time_channels: int,
        modulated: int,
        modulation: str = "token",
        modulate_mlp: bool = True,
        dropout: float = 0.0,
        attention_bias: bool = False,
    ) -> None:
        super().__init__()
        self.by_token, self.modulate_mlp = modulation == "token", modulate_mlp
        self.modulation = nn.Linear(time_channels, 2 * modulated)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(
            dim,
            heads=num_attention_heads,
            dim_head=dim // num_attention_heads,
            bias=attention_bias,
            dropout=dropout,
            processor=SiTAttnProcessor(),
        )
        self.norm2 = nn.LayerNorm(dim)
        self.ff = FeedForward(
            dim, activation_fn="gelu", inner_dim=int(dim * mlp_ratio), dropout=dropout, final_dropout=dropout > 0
        )

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        """Tokens `(B, N, D)` at times `(B, time_channels)`, or without any."""
        scale_shift = None
        if temb is not None:
            parts = self.modulation(functional.silu(temb)).chunk(2, dim=-1)
            scale_shift = [part[:, :, None] if self.by_token else part[:, None] for part in parts]
        hidden_states = _modulated(hidden_states, scale_shift)
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        if self.modulate_mlp:
            hidden_states = _modulated(hidden_states, scale_shift)
        return hidden_states + self.ff(self.norm2(hidden_states))


def _modulated(value: Tensor, scale_shift: list[Tensor] | None) -> Tensor:
    if scale_shift is None:
        return value
    scale, shift = scale_shift
    return value * (1 + scale) + shift


def patchify(images: Tensor, patch: int) -> Tensor:
    """Images `(B, C, H, W)` as patches `(B, H W / p^2, p p C)`, in row-major order.

    Args:
        images: Of any height and width that the patch divides.
        patch: p.

    Example:
        >>> patchify(torch.ones(1, 3, 4, 6), 2).shape
        torch.Size([1, 6, 12])
    """
    batch, channels, height, width = images.shape
    cut = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchify`.

    Args:
        patches: `(B, h w, p p C)`.
        grid: (h, w) in patches.
        patch: p.
    """
    cut = patches.reshape(patches.shape[0], *grid, patch, patch, -1)
    return cut.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, grid[0] * patch, grid[1] * patch)


__all__ = ["JointViTBlock", "JointViTModel", "JointViTOutput", "patchify", "unpatchify"]
