"""RCG's representation diffusion model in its authors' names, written out as formulas in float64."""

import math

import torch
import torch.nn.functional as F


class OfficialRDM:
    """Random weights of the authors' module, and what its averaged network gives."""

    def __init__(self, channels=6, width=16, inner=12, time=8, depth=2, classes=0, context=4, seed=0):
        self.generator, self.width, self.depth, self.classes = (
            torch.Generator().manual_seed(seed),
            width,
            depth,
            classes,
        )
        shapes = {
            "time_embed.0": (time, width), "time_embed.2": (time, time), "input_proj": (width, channels),
            "out.0": (width,), "out.2": (channels, width),
        }  # fmt: skip
        for at in range(depth):
            block = f"res_blocks.{at}."
            shapes |= {block + "in_layers.0": (width,), block + "in_layers.2": (inner, width)}
            shapes |= {block + "emb_layers.1": (inner, time), block + "out_layers.0": (inner,)}
            shapes |= {block + "out_layers.3": (width, inner)}
            if classes:
                shapes[block + "context_layers.1"] = (inner, context)
        self.average, self.trained = self.draw(shapes), self.draw(shapes)
        self.table = torch.randn(classes, context, generator=self.generator) if classes else None

    def draw(self, shapes):
        made = {}
        for name, shape in shapes.items():
            made[f"{name}.weight"] = 0.4 * torch.randn(shape, generator=self.generator)
            made[f"{name}.bias"] = 0.4 * torch.randn(shape[:1], generator=self.generator)
        return made

    def checkpoint(self, average=True):
        """The file as the authors' script saves it."""
        state = {f"model.diffusion_model.{name}": value for name, value in self.trained.items()}
        if average:
            flat = {f"diffusion_model.{name}".replace(".", ""): value for name, value in self.average.items()}
            state |= {f"model_ema.{name}": value for name, value in flat.items()}
            state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        table = torch.randn(1, 4, generator=self.generator) if self.table is None else self.table
        state |= {"cond_stage_model.embedding.weight": table, "betas": torch.linspace(0.1, 0.2, 5)}
        state["pretrained_encoder.cls_token"] = torch.zeros(1, 1, 4)
        return {"model": state, "epoch": 3}

    def __call__(self, x, t, labels=None, weights=None):
        held = {name: value.double() for name, value in (weights or self.average).items()}

        def linear(name, value):
            return value @ held[f"{name}.weight"].T + held[f"{name}.bias"]

        def norm(name, value, eps):
            spread = value.var(-1, correction=0, keepdim=True)
            value = (value - value.mean(-1, keepdim=True)) / (spread + eps).sqrt()
            return value * held[f"{name}.weight"] + held[f"{name}.bias"]

        half = self.width // 2
        angles = t.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(half).double() / half)
        time = linear("time_embed.2", F.silu(linear("time_embed.0", torch.cat([angles.cos(), angles.sin()], -1))))
        h = linear("input_proj", x.double())
        for at in range(self.depth):
            block = f"res_blocks.{at}."
            inner = linear(block + "in_layers.2", F.silu(norm(block + "in_layers.0", h, 1e-5)))
            inner = inner + linear(block + "emb_layers.1", F.silu(time))
            if self.classes:
                inner = inner + linear(block + "context_layers.1", F.silu(self.table.double()[labels]))
            h = h + linear(block + "out_layers.3", F.silu(norm(block + "out_layers.0", inner, 1e-5)))
        return linear("out.2", F.silu(norm("out.0", h, 1e-6)))
