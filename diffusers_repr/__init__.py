"""Representation learning with, and for, diffusion models, on top of Hugging Face diffusers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

# Public name -> the module that defines it. Nothing is imported before it is asked for.
_PUBLIC = {
    "AttentionOutput": "diffusers_repr.features.attention",
    "AutoGuidance": "diffusers_repr.guidance",
    "CFG": "diffusers_repr.guidance",
    "ClassifierGuidance": "diffusers_repr.guidance",
    "Condition": "diffusers_repr.denoiser",
    "Denoiser": "diffusers_repr.denoiser",
    "DepthGuidance": "diffusers_repr.guidance",
    "DepthHead": "diffusers_repr.heads",
    "EnergyGuidance": "diffusers_repr.guidance",
    "Family": "diffusers_repr.denoiser",
    "FeatureExtractor": "diffusers_repr.features",
    "FeatureOutput": "diffusers_repr.features",
    "FeatureStore": "diffusers_repr.features.store",
    "GenericFamily": "diffusers_repr.denoiser",
    "KNNHead": "diffusers_repr.heads",
    "Layer": "diffusers_repr.denoiser",
    "LinearHead": "diffusers_repr.heads",
    "MLPHead": "diffusers_repr.heads",
    "NoiseLevel": "diffusers_repr.noise",
    "NoiseSchedule": "diffusers_repr.noise",
    "NoisyClassifier": "diffusers_repr.models",
    "PAG": "diffusers_repr.guidance",
    "Prediction": "diffusers_repr.noise",
    "Preset": "diffusers_repr.features.presets",
    "Probe": "diffusers_repr.tasks",
    "ProbeOutput": "diffusers_repr.tasks",
    "ProbeRecipe": "diffusers_repr.tasks",
    "ReadoutGuidance": "diffusers_repr.guidance",
    "ReadoutHead": "diffusers_repr.heads",
    "SAG": "diffusers_repr.guidance",
    "Selection": "diffusers_repr.features.selection_result",
    "Tape": "diffusers_repr.capture",
    "attention_layers": "diffusers_repr.capture",
    "attention_maps": "diffusers_repr.features.attention",
    "attention_memory": "diffusers_repr.capture",
    "capture_attention": "diffusers_repr.capture",
    "describe": "diffusers_repr.guidance",
    "fit_head": "diffusers_repr.heads",
    "guide": "diffusers_repr.guidance",
    "list_layers": "diffusers_repr.denoiser",
    "list_presets": "diffusers_repr.features.presets",
    "match_layers": "diffusers_repr.capture",
    "pool": "diffusers_repr.features",
    "presets": "diffusers_repr.features.presets",
    "register_family": "diffusers_repr.denoiser",
    "register_stream": "diffusers_repr.denoiser",
    "select_features": "diffusers_repr.features.selection",
    "tokens_to_map": "diffusers_repr.features",
}

__all__ = sorted([*_PUBLIC, "__version__"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})
