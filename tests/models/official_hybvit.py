"""A plain HybViT (arXiv 2208.07791) in the names of its authors' checkpoints, to compare converted networks with."""

import math

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import nn


class Residual(nn.Module):
    """The part of a block that is added: a layer behind a norm."""

    def __init__(self, dim, fn):
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), fn

    def forward(self, x):
        return self.fn(self.norm(x))


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.to_qkv = heads, nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(0))

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.to_out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0), nn.Linear(2 * dim, dim), nn.Dropout(0)
        )

    def forward(self, x):
        return self.net(x)


class Blocks(nn.Module):
    def __init__(self, dim, heads, depth, tokens):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Residual(dim, SelfAttention(dim, heads)), Residual(dim, FeedForward(dim))])
            for _ in range(depth)
        )
        self.time_layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(4 * tokens, 2 * tokens)) for _ in range(depth)
        )


class OfficialHybViT(nn.Module):
    """Square images, patches in row-major order; every weight drawn, so that nothing is 0."""

    def __init__(self, side=8, patch=2, channels=3, dim=24, depth=2, heads=12, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.channels, self.rows = patch, channels, side // patch
        tokens, values = self.rows**2 + 1, patch * patch * channels
        self.to_patch_embedding = nn.Sequential(nn.Identity(), nn.Linear(values, dim))
        self.time_mlp = nn.Sequential(
            nn.Identity(), nn.Linear(dim, 4 * tokens), nn.GELU(), nn.Linear(4 * tokens, 4 * tokens)
        )
        self.cls_token, self.pos_embedding = (nn.Parameter(torch.randn(1, n, dim)) for n in (1, tokens))
        self.transformer = Blocks(dim, heads, depth, tokens)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))
        self.recon_head = nn.Sequential(nn.Linear(dim, values))
        self.eval()

    def waves(self, t):
        half = self.to_patch_embedding[1].out_features // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / (half - 1))
        return torch.cat([angles.sin(), angles.cos()], dim=1)

    def forward(self, x, t=None):
        """Noise and logits."""
        p, rows = self.patch, self.rows
        patches = F.unfold(x, p, stride=p).unflatten(1, (self.channels, p * p)).permute(0, 3, 2, 1).flatten(2)
        h = torch.cat([self.cls_token.expand(len(x), -1, -1), self.to_patch_embedding[1](patches)], 1)
        h = h + self.pos_embedding
        time = None if t is None else self.time_mlp[1:](self.waves(t))
        for at, (attention, mlp) in enumerate(self.transformer.layers):
            scale, shift = (0, 0) if time is None else self.transformer.time_layers[at](time)[..., None].chunk(2, 1)
            h = h * (scale + 1) + shift
            h = h + attention(h)
            h = h * (scale + 1) + shift
            h = h + mlp(h)
        out = self.recon_head(h[:, 1:]).unflatten(2, (p, p, self.channels)).unflatten(1, (rows, rows))
        return out.permute(0, 5, 1, 3, 2, 4).reshape(x.shape), self.mlp_head(h[:, 0])


def diffusion_state(network, timesteps=1000):
    """The state of the diffusion module around a network: its tables too."""
    betas = DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2").betas
    tables = {"betas": betas, "alphas_cumprod": (1 - betas).cumprod(0)}
    return tables | {f"denoise_fn.{name}": value for name, value in network.state_dict().items()}
