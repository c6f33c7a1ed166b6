"""What the tests of training objectives share: tiny networks, teachers and batches."""

import torch
from torch import nn

from diffusers_repr import Denoiser
from diffusers_repr.encoders import Encoder
from diffusers_repr.models import SiTTransformer2DModel
from diffusers_repr.noise import NoiseSchedule

LINEAR = NoiseSchedule("flow", "velocity")
COSINE = NoiseSchedule("cosine_flow", "velocity")
SMALL = {"projector_dim": 16}


def shake(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Random weights everywhere: a network that starts as the identity hides what is to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, std, generator=generator)
    return model


def sit(schedule: NoiseSchedule = LINEAR, layers: int = 4, **changes) -> Denoiser:
    settings = {"sample_size": 8, "patch_size": 2, "in_channels": 3, "num_layers": layers, "hidden_size": 16,
                "num_attention_heads": 2, "num_classes": 5}  # fmt: skip
    return Denoiser(shake(SiTTransformer2DModel(**{**settings, **changes})), schedule=schedule)


def teacher(stride: int = 2, dim: int = 6, name: str = "teacher", seed: int = 1, **options) -> Encoder:
    net = shake(nn.Conv2d(3, dim, stride, stride=stride), seed)
    return Encoder.from_module(net, patch_size=stride, name=name, **options)


class TinyTeacher(Encoder):
    """Gives the attention that it is told."""

    def encode_with_attention(self, pixels, layers):
        generator = torch.Generator().manual_seed(int(pixels.abs().sum() * 1000))
        rows = torch.randn(len(layers), len(pixels), 3, 16, 16, generator=generator)
        return self.encode_pixels(pixels), list(rows.softmax(-1))


def attention_teacher(stride=2):
    encoder = teacher(stride)
    return TinyTeacher(encoder.source, encoder.name)


def batch(count: int = 3, size: int = 8, seed: int = 2, channels: int = 3, classes: int = 5) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(count, channels, size, size, generator=generator) * 2 - 1,
        "class_labels": torch.randint(classes, (count,), generator=generator),
    }


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def backward(objective: nn.Module, data: dict, seed: int = 0) -> tuple[dict, dict]:
    """Losses and gradients of one call from a seed."""
    objective.zero_grad()
    torch.manual_seed(seed)
    out = objective(data)
    out["loss"].backward()
    return out, gradients(objective)
