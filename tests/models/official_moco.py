"""A plain MoCo v3 vision transformer in its authors' names, computed with loops, to hold the converted one against."""

import math

import torch
from torch import nn
from torch.nn import functional


def position_table(side, dim):
    """`(1, 1 + side * side, dim)`: place by place, the class token's empty."""
    quarter = dim // 4
    table = torch.zeros(1 + side * side, dim, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                for half, at in ((0, row), (2, column)):
                    angle = at / 10000 ** (i / quarter)
                    table[1 + row * side + column, half * quarter + i] = math.sin(angle)
                    table[1 + row * side + column, (half + 1) * quarter + i] = math.cos(angle)
    return table[None]


class OfficialMoCo(nn.Module):
    """Weights are drawn, none is zero; `checkpoint` has what the training script saves."""

    def __init__(self, side=8, patch=2, dim=16, depth=2, heads=2, hidden=64):
        super().__init__()
        self.patch, self.heads, self.depth = patch, heads, depth
        shapes = {"patch_embed.proj": (dim, 3, patch, patch), "norm": (dim,)}
        for at in range(depth):
            shapes |= {f"blocks.{at}.norm1": (dim,), f"blocks.{at}.norm2": (dim,)}
            shapes |= {f"blocks.{at}.attn.qkv": (3 * dim, dim), f"blocks.{at}.attn.proj": (dim, dim)}
            shapes |= {f"blocks.{at}.mlp.fc1": (hidden, dim), f"blocks.{at}.mlp.fc2": (dim, hidden)}
        generator = torch.Generator().manual_seed(0)
        self.weights = {}
        for name, shape in shapes.items():
            self.weights[f"{name}.weight"] = 0.3 * torch.randn(shape, generator=generator) + (len(shape) == 1)
            self.weights[f"{name}.bias"] = 0.2 * torch.randn(shape[:1], generator=generator)
        self.weights["cls_token"] = torch.randn(1, 1, dim, generator=generator)
        self.weights["pos_embed"] = position_table(side // patch, dim).float()

    def checkpoint(self, arch="vit_small"):
        """As saved under DDP, with the moving average, the heads and the optimizer."""
        state = {f"module.base_encoder.{name}": value for name, value in self.weights.items()}
        state |= {f"module.momentum_encoder.{name}": value + 1 for name, value in self.weights.items()}
        for encoder in ("base_encoder", "momentum_encoder"):
            state[f"module.{encoder}.head.0.weight"] = torch.ones(4, 4)
            state[f"module.{encoder}.head.1.num_batches_tracked"] = torch.tensor(3)
        state["module.predictor.0.weight"] = torch.ones(4, 4)
        optimizer = {
            "state": {0: {"step": 3, "exp_avg": torch.ones(2)}},
            "param_groups": [{"lr": 1e-4, "params": [0]}],
        }
        return {"epoch": 300, "arch": arch, "state_dict": state, "optimizer": optimizer, "scaler": {"scale": 65536.0}}

    def part(self, name, x):
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def normed(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def forward(self, pixels):
        """Tokens after the last norm, the class token first."""
        p = self.patch
        rows = [
            self.weights["patch_embed.proj.weight"].flatten(1) @ pixels[:, :, i : i + p, j : j + p].flatten(1).T
            + self.weights["patch_embed.proj.bias"][:, None]
            for i in range(0, pixels.shape[2], p)
            for j in range(0, pixels.shape[3], p)
        ]
        tokens = torch.stack([row.T for row in rows], 1)
        x = torch.cat([self.weights["cls_token"].expand(len(pixels), -1, -1), tokens], 1) + self.weights["pos_embed"]
        for at in range(self.depth):
            b, n, d = x.shape
            qkv = self.part(f"blocks.{at}.attn.qkv", self.normed(f"blocks.{at}.norm1", x))
            q, k, v = qkv.reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = (q @ k.mT / math.sqrt(d // self.heads)).softmax(-1) @ v
            x = x + self.part(f"blocks.{at}.attn.proj", mixed.transpose(1, 2).reshape(b, n, d))
            h = self.part(f"blocks.{at}.mlp.fc1", self.normed(f"blocks.{at}.norm2", x))
            x = x + self.part(f"blocks.{at}.mlp.fc2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)
        return self.normed("norm", x)
