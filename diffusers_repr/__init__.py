"""Representation learning with, and for, diffusion models, on top of Hugging Face diffusers."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

# Public name -> the module that defines it. Nothing is imported before it is asked for.
_PUBLIC = {
    "Alignment": "diffusers_repr.sweep",
    "Assigner": "diffusers_repr.assign",
    "AttentionOutput": "diffusers_repr.features.attention",
    "AutoGuidance": "diffusers_repr.guidance",
    "AutoencoderObjective": "diffusers_repr.objectives",
    "CFG": "diffusers_repr.guidance",
    "CaptionConditioner": "diffusers_repr.denoiser",
    "ClassifierGuidance": "diffusers_repr.guidance",
    "ClassifierObjective": "diffusers_repr.objectives",
    "Condition": "diffusers_repr.denoiser",
    "Conditioner": "diffusers_repr.denoiser",
    "ContrastiveObjective": "diffusers_repr.objectives",
    "Correspondence": "diffusers_repr.tasks",
    "DataConfig": "diffusers_repr.data",
    "Denoiser": "diffusers_repr.denoiser",
    "DepthGuidance": "diffusers_repr.guidance",
    "DepthHead": "diffusers_repr.heads",
    "DiffusionObjective": "diffusers_repr.objectives",
    "Encoder": "diffusers_repr.encoders",
    "EncoderFamily": "diffusers_repr.encoders",
    "EncoderOutput": "diffusers_repr.encoders",
    "EnergyGuidance": "diffusers_repr.guidance",
    "Family": "diffusers_repr.denoiser",
    "FeatureExtractor": "diffusers_repr.features",
    "FeatureOutput": "diffusers_repr.features",
    "FeatureStore": "diffusers_repr.store",
    "GeneratorPrior": "diffusers_repr.denoiser",
    "GenericFamily": "diffusers_repr.denoiser",
    "HistogramPrior": "diffusers_repr.denoiser",
    "HybViTObjective": "diffusers_repr.objectives.joint.hybvit",
    "IdentityAssigner": "diffusers_repr.assign",
    "JDMObjective": "diffusers_repr.objectives.joint.jdm",
    "JointHead": "diffusers_repr.heads",
    "JointViTModel": "diffusers_repr.models",
    "KNNHead": "diffusers_repr.heads",
    "LabelConditioner": "diffusers_repr.denoiser",
    "Layer": "diffusers_repr.denoiser",
    "LayoutConditioner": "diffusers_repr.denoiser",
    "LinearHead": "diffusers_repr.heads",
    "MLPHead": "diffusers_repr.heads",
    "MapConditioner": "diffusers_repr.denoiser",
    "MetricRecord": "diffusers_repr.metrics",
    "NoiseLevel": "diffusers_repr.noise",
    "NoiseSchedule": "diffusers_repr.noise",
    "NoisyClassifier": "diffusers_repr.models",
    "Objective": "diffusers_repr.objectives",
    "OnlineGuidanceObjective": "diffusers_repr.objectives",
    "PAG": "diffusers_repr.guidance",
    "PerceptualLoss": "diffusers_repr.objectives",
    "PerceptualObjective": "diffusers_repr.objectives",
    "PixelEnsembleHead": "diffusers_repr.heads",
    "Prediction": "diffusers_repr.noise",
    "Preset": "diffusers_repr.features.presets",
    "Prior": "diffusers_repr.denoiser",
    "Probe": "diffusers_repr.tasks",
    "ProbeOutput": "diffusers_repr.tasks",
    "ProbeRecipe": "diffusers_repr.tasks",
    "Projector": "diffusers_repr.heads",
    "QueryPrior": "diffusers_repr.denoiser",
    "REGObjective": "diffusers_repr.objectives.repa.reg",
    "REPAEObjective": "diffusers_repr.objectives.repa.repa_e",
    "REPAObjective": "diffusers_repr.objectives",
    "ReadoutGuidance": "diffusers_repr.guidance",
    "ReadoutHead": "diffusers_repr.heads",
    "ReadoutObjective": "diffusers_repr.objectives",
    "RepresentationMLPModel": "diffusers_repr.models",
    "RepresentationObjective": "diffusers_repr.objectives",
    "SAG": "diffusers_repr.guidance",
    "SimCLRObjective": "diffusers_repr.objectives",
    "SegmentationOutput": "diffusers_repr.tasks",
    "SegmentationRecipe": "diffusers_repr.tasks",
    "Segmenter": "diffusers_repr.tasks",
    "Selection": "diffusers_repr.sweep",
    "SeveralConditioner": "diffusers_repr.denoiser",
    "SiTTransformer2DModel": "diffusers_repr.models",
    "StoredPrior": "diffusers_repr.denoiser",
    "SummedReadoutGuidance": "diffusers_repr.guidance",
    "Tape": "diffusers_repr.capture",
    "TokenConditioner": "diffusers_repr.denoiser",
    "TrainingConfig": "diffusers_repr.training",
    "UViTTransformer2DModel": "diffusers_repr.models",
    "VectorConditioner": "diffusers_repr.denoiser",
    "VectorEmbedding": "diffusers_repr.models",
    "attention_layers": "diffusers_repr.capture",
    "attention_maps": "diffusers_repr.features.attention",
    "attention_memory": "diffusers_repr.capture",
    "capture_attention": "diffusers_repr.capture",
    "cka": "diffusers_repr.metrics",
    "cknna": "diffusers_repr.metrics",
    "describe": "diffusers_repr.guidance",
    "few_shot_probe": "diffusers_repr.sweep",
    "fit_head": "diffusers_repr.heads",
    "frechet_distance": "diffusers_repr.metrics",
    "guide": "diffusers_repr.guidance",
    "is_guided": "diffusers_repr.guidance",
    "knn_probe": "diffusers_repr.sweep",
    "linear_probe": "diffusers_repr.sweep",
    "list_encoder_families": "diffusers_repr.encoders",
    "list_layers": "diffusers_repr.denoiser",
    "list_presets": "diffusers_repr.features.presets",
    "load_prior": "diffusers_repr.denoiser",
    "load_train_data": "diffusers_repr.data",
    "match_layers": "diffusers_repr.capture",
    "measure_alignment": "diffusers_repr.sweep",
    "mean_iou": "diffusers_repr.metrics",
    "measure_generation": "diffusers_repr.metrics",
    "pool": "diffusers_repr.features",
    "precision_recall": "diffusers_repr.metrics",
    "presets": "diffusers_repr.features.presets",
    "register_encoder_family": "diffusers_repr.encoders",
    "register_family": "diffusers_repr.denoiser",
    "register_block_output": "diffusers_repr.denoiser",
    "select_features": "diffusers_repr.sweep",
    "tokens_to_map": "diffusers_repr.features",
    "train": "diffusers_repr.training",
    "unguide": "diffusers_repr.guidance",
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
