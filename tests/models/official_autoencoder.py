"""The autoencoder of latent diffusion's code by the names of its checkpoints: another way to the same numbers."""

import torch
from torch.nn import functional


def drawn_weights(width=32, latent=4, attention=True):
    """Two levels, the second twice as wide and with attention; one block a level down, two up."""
    shapes = {}

    def conv(name, out, into, side=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into, side, side), (out,)

    def norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def block(name, into, out):
        norm(f"{name}.norm1", into), conv(f"{name}.conv1", out, into)
        norm(f"{name}.norm2", out), conv(f"{name}.conv2", out, out)
        if into != out:
            conv(f"{name}.nin_shortcut", out, into, 1)

    def attend(name, channels):
        norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", channels, channels, 1)

    def middle(side, channels):
        block(f"{side}.mid.block_1", channels, channels), block(f"{side}.mid.block_2", channels, channels)
        attend(f"{side}.mid.attn_1", channels)

    wide = 2 * width
    conv("encoder.conv_in", width, 3), block("encoder.down.0.block.0", width, width)
    conv("encoder.down.0.downsample.conv", width, width), block("encoder.down.1.block.0", width, wide)
    middle("encoder", wide), norm("encoder.norm_out", wide), conv("encoder.conv_out", 2 * latent, wide)
    conv("quant_conv", 2 * latent, 2 * latent, 1), conv("post_quant_conv", latent, latent, 1)
    conv("decoder.conv_in", wide, latent), middle("decoder", wide)
    for at, into in ((0, wide), (1, wide)):
        block(f"decoder.up.1.block.{at}", into, wide)
        block(f"decoder.up.0.block.{at}", wide if at == 0 else width, width)
        if attention:
            attend(f"decoder.up.1.attn.{at}", wide)
    if attention:
        attend("encoder.down.1.attn.0", wide)
    conv("decoder.up.1.upsample.conv", wide, wide), norm("decoder.norm_out", width), conv("decoder.conv_out", 3, width)
    generator = torch.Generator().manual_seed(4)
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Official:
    """Calls by name."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, name, x, **options):
        return functional.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **options)

    def norm(self, name, x):
        grouped = x.reshape(len(x), 32, -1)
        grouped = (grouped - grouped.mean(-1, keepdim=True)) / (
            grouped.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()
        scale, shift = (self.weights[f"{name}.{end}"].view(1, -1, 1, 1) for end in ("weight", "bias"))
        return grouped.reshape(x.shape) * scale + shift

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", functional.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", functional.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attend(self, name, x):
        if f"{name}.q.weight" not in self.weights:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")
        weights = (q.mT @ k * q.shape[1] ** -0.5).softmax(-1)
        return x + self.conv(f"{name}.proj_out", (v @ weights.mT).view(x.shape))

    def middle(self, side, x):
        x = self.attend(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        return self.block(f"{side}.mid.block_2", x)

    def encode(self, images):
        """Mean of the posterior."""
        h = self.block("encoder.down.0.block.0", self.conv("encoder.conv_in", images, padding=1))
        h = self.conv("encoder.down.0.downsample.conv", functional.pad(h, (0, 1, 0, 1)), stride=2)
        h = self.attend("encoder.down.1.attn.0", self.block("encoder.down.1.block.0", h))
        h = functional.silu(self.norm("encoder.norm_out", self.middle("encoder", h)))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h, padding=1)).chunk(2, 1)[0]

    def decode(self, latents):
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", latents), padding=1)
        h = self.middle("decoder", h)
        for level in (1, 0):
            for at in (0, 1):
                h = self.attend(f"decoder.up.{level}.attn.{at}", self.block(f"decoder.up.{level}.block.{at}", h))
            if level:
                h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                h = self.conv("decoder.up.1.upsample.conv", h, padding=1)
        return self.conv("decoder.conv_out", functional.silu(self.norm("decoder.norm_out", h)), padding=1)
