"""The transformer of U-ViT as its checkpoints name it: another way to the same numbers, for tests.

Plain: weights by name in a dict, patches by loops, attention by an explicit softmax.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional


def drawn_weights(
    width=16, half=2, side=4, patch=2, channels=4, classes=0, text=None, bias=False, time_mlp=False, conv=True
) -> dict[str, Tensor]:
    """A state dict with the names of the authors' code."""
    generator = torch.Generator().manual_seed(0)
    extra = 1 + bool(classes) + (text[0] if text else 0)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, extra + side * side, width)}

    def linear(name, out, into, biased=True):
        shapes[f"{name}.weight"] = (out, into)
        if biased:
            shapes[f"{name}.bias"] = (out,)

    shapes |= {"patch_embed.proj.weight": (width, channels, patch, patch), "patch_embed.proj.bias": (width,)}
    if time_mlp:
        linear("time_embed.0", 4 * width, width)
        linear("time_embed.2", width, 4 * width)
    if classes:
        shapes["label_emb.weight"] = (classes, width)
    if text:
        linear("context_embed", width, text[1])
    blocks = [f"in_blocks.{at}" for at in range(half)] + ["mid_block"] + [f"out_blocks.{at}" for at in range(half)]
    for name in blocks:
        for norm in ("norm1", "norm2"):
            shapes |= {f"{name}.{norm}.weight": (width,), f"{name}.{norm}.bias": (width,)}
        linear(f"{name}.attn.qkv", 3 * width, width, bias)
        linear(f"{name}.attn.proj", width, width)
        linear(f"{name}.mlp.fc1", 4 * width, width)
        linear(f"{name}.mlp.fc2", width, 4 * width)
        if name.startswith("out"):
            linear(f"{name}.skip_linear", width, 2 * width)
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    linear("decoder_pred", patch * patch * channels, width)
    if conv:
        shapes |= {"final_layer.weight": (channels, channels, 3, 3), "final_layer.bias": (channels,)}
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def run(weights: dict[str, Tensor], heads: int, x: Tensor, told: Tensor, label=None, text=None) -> Tensor:
    """What the network gives, in float64: `told` is what it is told of the time."""
    w = {name: value.double() for name, value in weights.items()}
    x = x.double()
    channels, patch = w["patch_embed.proj.weight"].shape[1:3]
    width = w["pos_embed"].shape[-1]

    def linear(h, name):
        return functional.linear(h, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(h, name):
        centred = h - h.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def attend(h, name):
        b, n, d = h.shape
        q, k, v = linear(h, f"{name}.qkv").reshape(b, n, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        out = (q @ k.mT / math.sqrt(d // heads)).softmax(-1) @ v
        return linear(out.transpose(1, 2).reshape(b, n, d), f"{name}.proj")

    def block(h, name, skip=None):
        if skip is not None:
            h = linear(torch.cat([h, skip], -1), f"{name}.skip_linear")
        h = h + attend(norm(h, f"{name}.norm1"), f"{name}.attn")
        hidden = linear(norm(h, f"{name}.norm2"), f"{name}.mlp.fc1")
        return h + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, f"{name}.mlp.fc2")

    rates = torch.exp(torch.arange(width // 2, dtype=torch.float64) * (-math.log(1e4) / (width // 2)))
    angles = told.double()[:, None] * rates
    time = torch.cat([angles.cos(), angles.sin()], -1)
    if "time_embed.0.weight" in w:
        time = linear(functional.silu(linear(time, "time_embed.0")), "time_embed.2")
    rows, columns = x.shape[2] // patch, x.shape[3] // patch
    tokens = torch.stack(
        [
            torch.einsum(
                "bcij,dcij->bd", x[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch],
                w["patch_embed.proj.weight"],
            )
            + w["patch_embed.proj.bias"]
            for r in range(rows)
            for c in range(columns)
        ],
        1,
    )  # fmt: skip
    front = [time[:, None]]
    if label is not None:
        front.insert(0, w["label_emb.weight"][label][:, None])
    if text is not None:
        front.append(linear(text.double(), "context_embed"))
    h = torch.cat([*front, tokens], 1) + w["pos_embed"]
    kept, half = [], sum(name.endswith("norm1.weight") for name in w if name.startswith("in_blocks"))
    for at in range(half):
        h = block(h, f"in_blocks.{at}")
        kept.append(h)
    h = block(h, "mid_block")
    for at in range(half):
        h = block(h, f"out_blocks.{at}", kept[half - 1 - at])
    h = linear(norm(h, "norm"), "decoder_pred")[:, -rows * columns :]
    image = torch.zeros_like(x)
    for at in range(rows * columns):
        r, c = divmod(at, columns)
        cell = h[:, at].reshape(-1, patch, patch, channels).permute(0, 3, 1, 2)
        image[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = cell
    if "final_layer.weight" in w:
        image = functional.conv2d(image, w["final_layer.weight"], w["final_layer.bias"], padding=1)
    return image
