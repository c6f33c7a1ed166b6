"""What the tests of distillation share: tiny teachers, students and batches."""

import torch
from torch import nn

from diffusers_repr import Denoiser
from diffusers_repr.objectives import (
    DreamTeacherConfig,
    DreamTeacherObjective,
    RepFusionConfig,
    RepFusionObjective,
    Student,
    StudentConfig,
)
from tests.testers.models import build

# Layer scale starts at 1e-6 in transformers, so that a new ConvNeXt shows nothing of its blocks.
CONVNEXT = {"model_type": "convnext", "patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 1],
            "layer_scale_init_value": 1.0}  # fmt: skip


def denoiser() -> Denoiser:
    """A U-Net of 16 x 16 pixels in colour, up blocks of stride 4, 2 and 1."""
    torch.manual_seed(0)
    found = Denoiser.from_pipe(build("ddim"))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return found


def student(size: tuple[int, int] = (16, 16), **changes) -> Student:
    torch.manual_seed(1)
    return StudentConfig({**CONVNEXT, **changes}).build(3, size)


def repfusion(classes: int = 5, of: Student | None = None, **settings) -> RepFusionObjective:
    settings = {"policy_levels": 4, **settings}
    return RepFusionObjective(denoiser(), of or student(), RepFusionConfig("base", **settings), classes).train()


def dreamteacher(of: Student | None = None, base: Denoiser | None = None, **settings) -> DreamTeacherObjective:
    settings = {"width": 8, **settings}
    config = DreamTeacherConfig("base", **settings)
    return DreamTeacherObjective(base or denoiser(), of or student(), config).train()


def batch(count: int = 4, size: tuple[int, int] = (16, 16)) -> dict:
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.rand(count, 3, *size, generator=generator) * 2 - 1,
        "noise": torch.randn(count, 3, *size, generator=generator),
        "class_labels": torch.arange(count) % 5,
    }


class Constant(nn.Module):
    """The same logits for every image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, pixels):
        return self.logits.expand(len(pixels), -1)
