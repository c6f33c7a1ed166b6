"""The transformer of DiT, SiT and REPA as their checkpoints name it: another way to the same numbers, for tests.

Plain and slow: tables and patches by loops, attention by an explicit softmax, no dispatcher, no processors.
"""

import math

import torch
from torch import nn
from torch.nn import functional


def position_table(side: int, dim: int) -> torch.Tensor:
    """Entry by entry: first half of the channels by column, second by row; of each, sines before cosines."""
    quarter = dim // 4
    table = torch.zeros(side * side, dim, dtype=torch.float64)
    for token in range(side * side):
        row, column = divmod(token, side)
        for half, place in enumerate((column, row)):
            for k in range(quarter):
                angle = place * 10000.0 ** (-k / quarter)
                table[token, half * 2 * quarter + k] = math.sin(angle)
                table[token, half * 2 * quarter + quarter + k] = math.cos(angle)
    return table[None]


class _Times(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        # float32 as in their code: at t = 999 the angles of DiT are only known to 1e-4
        rates = torch.exp(torch.arange(128, dtype=torch.float32) * -math.log(1e4) / 128)
        angles = t.float()[:, None] * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


class _Labels(nn.Module):
    def __init__(self, rows, dim):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, dim)


class _Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if qk_norm else nn.Identity()

    def forward(self, h):
        b, n, d = h.shape
        q, k, v = self.qkv(h).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = (self.q_norm(q) @ self.k_norm(k).mT / math.sqrt(d // self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class _Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, h):
        return self.fc2(functional.gelu(self.fc1(h), approximate="tanh"))


def _norm(h):
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class _Block(nn.Module):
    def __init__(self, dim, heads, hidden, qk_norm):
        super().__init__()
        self.attn, self.mlp = _Attention(dim, heads, qk_norm), _Mlp(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, h, c):
        s1, k1, g1, s2, k2, g2 = (part[:, None] for part in self.adaLN_modulation(c).chunk(6, 1))
        h = h + g1 * self.attn((1 + k1) * _norm(h) + s1)
        return h + g2 * self.mlp((1 + k2) * _norm(h) + s2)


class _Final(nn.Module):
    def __init__(self, dim, outputs):
        super().__init__()
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, h, c):
        s, k = (part[:, None] for part in self.adaLN_modulation(c).chunk(2, 1))
        return self.linear((1 + k) * _norm(h) + s)


class _Patches(nn.Module):
    def __init__(self, channels, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)


class OfficialSiT(nn.Module):
    """Weights are drawn, none is zero, so that every part shows in the output."""

    def __init__(
        self,
        side=8,
        patch=2,
        channels=4,
        dim=16,
        depth=2,
        heads=2,
        classes=10,
        learn_sigma=False,
        qk_norm=False,
        z_dims=(),
        projector_dim=24,
    ):
        super().__init__()
        self.patch, self.channels, self.learn_sigma = patch, channels, learn_sigma
        self.x_embedder = _Patches(channels, dim, patch)
        self.t_embedder, self.y_embedder = _Times(dim), _Labels(classes + 1, dim)
        self.pos_embed = nn.Parameter(position_table(side // patch, dim).float(), requires_grad=False)
        self.blocks = nn.ModuleList(_Block(dim, heads, 4 * dim, qk_norm) for _ in range(depth))
        outputs = patch * patch * channels * (2 if learn_sigma else 1)
        self.final_layer = _Final(dim, outputs)
        if z_dims:
            hidden = projector_dim
            self.projectors = nn.ModuleList(
                nn.Sequential(
                    nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, z)
                )
                for z in z_dims
            )
        generator = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if name != "pos_embed":
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)

    def hidden(self, x, t, y, depth):
        """Tokens after `depth` blocks."""
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder.embedding_table(y)
        for block in self.blocks[:depth]:
            h = block(h, c)
        return h, c

    def forward(self, x, t, y):
        """All output channels, `t` as the checkpoint's network takes it."""
        out = self.final_layer(*self.hidden(x, t, y, len(self.blocks)))
        side, p = x.shape[2] // self.patch, self.patch
        image = out.new_zeros(x.shape[0], out.shape[-1] // p**2, side * p, side * p)
        for token in range(side * side):
            row, column = divmod(token, side)
            cell = out[:, token].reshape(-1, p, p, image.shape[1]).permute(0, 3, 1, 2)
            image[:, :, row * p : row * p + p, column * p : column * p + p] = cell
        return image
