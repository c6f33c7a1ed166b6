"""`MaskGITVQModel`: the tokenizer of MaskGIT, MAGE and RCG, which is no `VQModel` of diffusers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn import functional

from diffusers_repr.hub.checks import check_sizes
from diffusers_repr.models.layers import keeping_weights
from diffusers_repr.models.mixin import ReprModelMixin


class MaskGITResnet(nn.Module):
    """`h = conv2(silu(norm2(conv1(silu(norm1(x))))))`, then `h + x`; where channels change, `h + W h`.

    The last is what the authors' code does: the shortcut reads h, and x is dropped.

    Args:
        in_channels: Of x.
        out_channels: Of h.
        groups: Of the norms.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes = in_channels != out_channels
        self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, in, H, W)` to `(B, out, H, W)`."""
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        return hidden + (x if self.nin_shortcut is None else self.nin_shortcut(hidden))


class MaskGITUpsample(nn.Module):
    """Twice the sides, by the nearest pixel, and a convolution.

    Args:
        channels: That enter and leave.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, C, 2 H, 2 W)`."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class MaskGITMiddle(nn.Module):
    """Two blocks of equal channels.

    Args:
        channels: That enter and leave.
        groups: Of the norms.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = MaskGITResnet(channels, channels, groups)
        self.block_2 = MaskGITResnet(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to the same."""
        return self.block_2(self.block_1(x))


class MaskGITLevel(nn.Module):
    """Blocks of one resolution, and behind them a doubling of the sides where there is one.

    Args:
        channels: That enter.
        out_channels: That leave.
        layers: Blocks.
        groups: Of the norms.
        doubles: Whether the sides are doubled.
    """

    def __init__(self, channels: int, out_channels: int, layers: int, groups: int, doubles: bool = False) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * layers
        self.block = nn.ModuleList(
            MaskGITResnet(one, two, groups) for one, two in zip(widths, widths[1:], strict=False)
        )
        self.upsample = MaskGITUpsample(out_channels) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, out, H, W)`, or twice the sides."""
        for block in self.block:
            x = block(x)
        return x if self.upsample is None else self.upsample(x)


class MaskGITEncoder(nn.Module):
    """Images in [0, 1] to latents; sides are halved by the mean of four pixels.

    Args:
        in_channels: Of the images.
        widths: Channels of each resolution.
        layers: Blocks of each.
        latent_channels: That leave.
        groups: Of the norms.
    """

    def __init__(
        self, in_channels: int, widths: Sequence[int], layers: int, latent_channels: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.down = nn.ModuleList(MaskGITLevel(one, two, layers, groups) for one, two in pairs)
        self.mid = MaskGITMiddle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], latent_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, D, h, w)`."""
        hidden = self.conv_in(x)
        for at, level in enumerate(self.down):
            hidden = level(hidden if not at else functional.avg_pool2d(hidden, 2))
        return self.conv_out(functional.silu(self.norm_out(self.mid(hidden))))


class MaskGITDecoder(nn.Module):
    """Codes to images in [0, 1].

    Args:
        out_channels: Of the images.
        widths: Channels of each resolution, from the images' on.
        layers: Blocks of each.
        latent_channels: That enter.
        groups: Of the norms.
    """

    def __init__(
        self, out_channels: int, widths: Sequence[int], layers: int, latent_channels: int, groups: int
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = MaskGITMiddle(widths[-1], groups)
        entering = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            MaskGITLevel(entering[at], width, layers, groups, doubles=at > 0) for at, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """`(B, D, h, w)` to `(B, C, H, W)`."""
        hidden = self.mid(self.conv_in(codes))
        for level in reversed(self.up):
            hidden = level(hidden)
        return self.conv_out(functional.silu(self.norm_out(hidden)))


class MaskGITCodebook(nn.Module):
    """Latents to the nearest of V codes; called as the `VectorQuantizer` of diffusers.

    Args:
        vocab_size: V.
        channels: D.
    """

    def __init__(self, vocab_size: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, channels)

    def forward(self, latents: Tensor) -> tuple[Tensor, None, tuple[None, None, Tensor]]:
        """Codes `(B, D, h, w)`, and as the last of the third the ids `(B h w,)`; the gradient passes to both."""
        count, device = self.embedding.num_embeddings, latents.device
        table = self.embedding(torch.arange(count, device=device))
        flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
        ids = torch.cdist(flat.detach().float(), table.detach().float()).argmin(1)
        codes = table.to(latents.dtype)[ids].view(len(latents), *latents.shape[2:], -1).permute(0, 3, 1, 2)
        return codes + (latents - latents.detach()), None, (None, None, ids)


class MaskGITVQModel(ReprModelMixin, ModelMixin, ConfigMixin):
    """Images to a grid of ids and back: the VQGAN of MaskGIT (arXiv 2202.04200), the tokenizer of MAGE and RCG.

    It is called as a `VQModel` of diffusers, with images in [-1, 1]; the authors' are in [0, 1]. The defaults are
    those of the published one. The names of its weights are the authors'.

    Args:
        in_channels: Of the images.
        block_out_channels: Channels of each resolution; each but the first has half the sides of the one before.
        layers_per_block: Blocks of each resolution.
        latent_channels: D of the codes.
        num_vq_embeddings: V.
        sample_size: Side of the images it was made for; others that it can halve do too.
        norm_num_groups: Of the norms.

    Raises:
        ValueError: For sizes below 1.
    """

    _no_split_modules = ["MaskGITResnet"]
    _skip_layerwise_casting_patterns = ["quantize", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        block_out_channels: Sequence[int] = (128, 128, 256, 256, 512),
        layers_per_block: int = 2,
        latent_channels: int = 256,
        num_vq_embeddings: int = 1024,
        sample_size: int = 256,
        norm_num_groups: int = 32,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, layers_per_block=layers_per_block, latent_channels=latent_channels)
        widths, groups = tuple(block_out_channels), norm_num_groups
        self.encoder = MaskGITEncoder(in_channels, widths, layers_per_block, latent_channels, groups)
        self.quantize = MaskGITCodebook(num_vq_embeddings, latent_channels)
        self.decoder = MaskGITDecoder(in_channels, widths, layers_per_block, latent_channels, groups)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple[Tensor]:
        """Latents `(B, D, h, w)`, not yet codes.

        Args:
            x: `(B, C, H, W)` in [-1, 1].
            return_dict: Whether to return an output object, else a tuple.
        """
        with keeping_weights(self.encoder.conv_in.weight.dtype, self.dtype):
            latents = self.encoder(x / 2 + 0.5)
        return VQEncoderOutput(latents=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(
        self, h: Tensor, force_not_quantize: bool = False, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Images in [-1, 1], not clamped.

        Args:
            h: Latents, or with `force_not_quantize` codes and mixtures of codes, `(B, D, h, w)`.
            force_not_quantize: Take them as they are.
            return_dict: Whether to return an output object, else a tuple.
        """
        codes = h if force_not_quantize else self.quantize(h)[0]
        with keeping_weights(self.decoder.conv_in.weight.dtype, self.dtype):
            sample = 2 * self.decoder(codes) - 1
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Reconstructions of images `(B, C, H, W)` in [-1, 1]."""
        return self.decode(self.encode(sample, return_dict=False)[0], return_dict=return_dict)


__all__ = ["MaskGITVQModel"]
