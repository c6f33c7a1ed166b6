"""Tiny vision transformers of transformers, saved with an image processor's statistics: seeded, nothing downloaded."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

SIZE = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
MLP = {"intermediate_size": 16}


def shape(side: int, patch: int) -> dict:
    return {"image_size": side, "patch_size": patch}


MODELS: dict[str, Callable[[int, int], PreTrainedModel]] = {
    "dinov2": lambda s, p: Dinov2Model(Dinov2Config(**SIZE, **shape(s, p), mlp_ratio=2)),
    "dinov2_with_registers": lambda s, p: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZE, **shape(s, p), mlp_ratio=2, num_register_tokens=3)
    ),
    "dinov3_vit": lambda s, p: DINOv3ViTModel(DINOv3ViTConfig(**SIZE, **MLP, **shape(s, p), num_register_tokens=2)),
    "clip_vision_model": lambda s, p: CLIPVisionModel(CLIPVisionConfig(**SIZE, **MLP, **shape(s, p))),
    "siglip_vision_model": lambda s, p: SiglipVisionModel(SiglipVisionConfig(**SIZE, **MLP, **shape(s, p))),
    "siglip2_vision_model": lambda s, p: Siglip2VisionModel(
        Siglip2VisionConfig(**SIZE, **MLP, patch_size=p, num_patches=(s // p) ** 2)
    ),
    "vit": lambda s, p: ViTModel(ViTConfig(**SIZE, **MLP, **shape(s, p)), add_pooling_layer=False),
    "vit_mae": lambda s, p: ViTMAEModel(ViTMAEConfig(**SIZE, **MLP, **shape(s, p), mask_ratio=0.75)),
    "ijepa": lambda s, p: IJepaModel(IJepaConfig(**SIZE, **MLP, **shape(s, p))),
}
PREFIX = {"dinov2_with_registers": 4, "dinov3_vit": 3, "siglip_vision_model": 0, "siglip2_vision_model": 0, "ijepa": 0}


def build(name: str, side: int = 8, patch: int = 2) -> PreTrainedModel:
    """A seeded model in eval mode; its weights are large enough for tokens to differ."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        model = MODELS[name](side, patch).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model: PreTrainedModel, folder: Path, **processor) -> Path:
    model.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def clip_with_text(folder: Path) -> tuple[CLIPModel, Path]:
    """The whole of CLIP, as the Hub holds it."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = CLIPConfig(
            text_config=text | {"vocab_size": 20}, vision_config={**SIZE, **MLP, **shape(8, 2)}, projection_dim=4
        )
        model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    return model, folder
