"""`SemanticEncoder`: an image to the code z of a diffusion autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.gathered import gathered
from diffusers_repr.models.mixin import ReprModelMixin
from diffusers_repr.models.unet_encoder import check_down_blocks, encoder_half

DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
_EPS, _MOMENTUM = 1e-5, 0.1  # torch's, of a batch norm


@dataclass
class SemanticEncoderOutput(BaseOutput):
    """What a `SemanticEncoder` gives.

    Attributes:
        code: z, `(B, D)`: the mean of the map; of a variational encoder the mean of its normal.
        log_variance: Of a variational encoder, `(B, D)`; else None.
        map: `(B, D, h, w)`, one code a place, whose mean z is.
    """

    code: Tensor
    log_variance: Tensor | None = None
    map: Tensor | None = None

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Z with its own noise, differentiably; z itself where the encoder is not variational."""
        if self.log_variance is None:
            return self.code
        noise = randn_tensor(self.code.shape, generator=generator, device=self.code.device, dtype=self.code.dtype)
        return self.code + (0.5 * self.log_variance).exp() * noise


class SemanticEncoder(ReprModelMixin, ModelMixin, ConfigMixin):
    """The downsampling half and the middle of a U-Net without time, then norm, SiLU, mean and a linear layer.

    The encoder of DiffAE (Preechakul et al. 2022, arXiv 2111.15640): the linear layer acts at every place before the
    mean, which is the same, so each place has a code and z is the mean of all.

    Args:
        in_channels: Of the images.
        code_dim: D of z.
        sample_size: Height and width of the images it was trained on, a number if they are equal. Others are taken.
        block_out_channels: Channels of each stage; all but the last halve height and width (rounded up).
        down_block_types: Of each stage, `DownEncoderBlock2D` or `AttnDownEncoderBlock2D`.
        layers_per_block: Residual blocks of a stage.
        attention_head_dim: Channels of an attention head, in the stages and the middle.
        mid_block_attention: Whether the middle block has attention.
        norm_num_groups: Groups of every group norm.
        norm_eps: Their epsilon.
        dropout: In the residual blocks.
        variational: Whether it gives a normal distribution of codes, as the penalty of the KL divergence needs it.
        standardize_features: Whether the linear layer sees the features standardised by the mean and deviation of the
            pooled ones, as by a batch norm without weights: over the batch of all processes in training mode, else by
            running averages. The paper has none. Behind norm, SiLU and mean most of a feature is the same for all
            images; in short trainings Adam then moves all entries of z together, and z stays a line.

    Raises:
        ValueError: For sizes and blocks that do not fit together.

    Example:
        >>> encoder = SemanticEncoder(1, 6, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)
        >>> found = encoder(torch.zeros(2, 1, 8, 8))
        >>> found.code.shape, found.map.shape
        (torch.Size([2, 6]), torch.Size([2, 6, 4, 4]))
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = [*DOWN_BLOCKS, "UNetMidBlock2D"]
    _skip_layerwise_casting_patterns = ["norm"]

    feature_mean: Tensor
    feature_var: Tensor

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        code_dim: int = 512,
        sample_size: int | tuple[int, int] | None = None,
        block_out_channels: Sequence[int] = (64, 128, 256, 512),
        down_block_types: Sequence[str] | None = None,
        layers_per_block: int = 1,
        attention_head_dim: int = 32,
        mid_block_attention: bool = True,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        variational: bool = False,
        standardize_features: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, code_dim=code_dim, layers_per_block=layers_per_block)
        check_sizes(attention_head_dim=attention_head_dim, norm_num_groups=norm_num_groups)
        channels = list(block_out_channels)
        kinds = [DOWN_BLOCKS[0]] * len(channels) if down_block_types is None else list(down_block_types)
        self.register_to_config(down_block_types=kinds)
        check_down_blocks(channels, kinds, DOWN_BLOCKS, attention_head_dim, norm_num_groups, mid_block_attention)
        width = channels[-1]
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks, self.mid_block = encoder_half(
            channels,
            kinds,
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            groups=norm_num_groups,
            eps=norm_eps,
            dropout=dropout,
            middle_attends=mid_block_attention,
        )
        self.norm_out = nn.GroupNorm(norm_num_groups, width, eps=norm_eps)
        if standardize_features:
            self.register_buffer("feature_mean", torch.zeros(width))
            self.register_buffer("feature_var", torch.ones(width))
        self.proj_out = nn.Conv2d(width, (2 if variational else 1) * code_dim, 1)

    def forward(self, sample: Tensor, return_dict: bool = True) -> SemanticEncoderOutput | tuple[Any, ...]:
        """Codes of images.

        Args:
            sample: `(B, C, H, W)` in [-1, 1].
            return_dict: False for the tuple `(code, log_variance, map)` without what is None.

        Raises:
            ValueError: For inputs of another shape, and a single image in training mode to standardise over.
        """
        channels = self.config["in_channels"]
        if sample.ndim != 4 or sample.shape[1] != channels:
            raise ValueError(f"This SemanticEncoder takes images (B, {channels}, H, W); got {tuple(sample.shape)}.")
        hidden = self.conv_in(sample)
        for block in self.down_blocks:
            hidden = block(hidden)
        features = functional.silu(self.norm_out(self.mid_block(hidden)))
        codes = self.proj_out(self._standardized(features) if self.config["standardize_features"] else features)
        pooled, dim = codes.mean((2, 3)), self.config["code_dim"]
        log_variance = pooled[:, dim:] if self.config["variational"] else None
        found = SemanticEncoderOutput(pooled[:, :dim], log_variance, codes[:, :dim])
        return found if return_dict else found.to_tuple()

    def _standardized(self, hidden: Tensor) -> Tensor:
        mean, var = self._moments(hidden.mean((2, 3))) if self.training else (self.feature_mean, self.feature_var)
        mean, scale = mean.to(hidden.dtype), torch.rsqrt(var + _EPS).to(hidden.dtype)
        return (hidden - mean[:, None, None]) * scale[:, None, None]

    def _moments(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over the batches of all processes; the running averages move towards them."""
        wide = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
        sums = torch.cat([wide.sum(0), wide.square().sum(0), wide.new_full((1,), len(wide))])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            sums = gathered(sums[None]).sum(0)  # with its gradient
        elif len(pooled) < 2:
            raise ValueError("standardize_features is over the batch of all processes; train on two images or more.")
        count = sums[-1]
        mean, square = (sums[:-1] / count).chunk(2)
        var = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            for running, found in ((self.feature_mean, mean), (self.feature_var, var * count / (count - 1))):
                running.lerp_(found.to(running.dtype), _MOMENTUM)
        return mean, var

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the map of images of `size` (H, W)."""
        height, width = size
        for _ in self.config["block_out_channels"][1:]:
            height, width = -(-height // 2), -(-width // 2)
        return height, width


__all__ = ["SemanticEncoder", "SemanticEncoderOutput"]
