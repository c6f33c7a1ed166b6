"""The Denoiser: a diffusers model, its scheduler, its VAE and its conditioning as one object."""

from diffusers_repr.denoiser import families
from diffusers_repr.denoiser.attention_layouts import AttentionLayout
from diffusers_repr.denoiser.block_outputs import register_block_output
from diffusers_repr.denoiser.condition import Condition
from diffusers_repr.denoiser.conditioner import (
    CaptionConditioner,
    Conditioner,
    LabelConditioner,
    LayoutConditioner,
    MapConditioner,
    SeveralConditioner,
    TokenConditioner,
    VectorConditioner,
)
from diffusers_repr.denoiser.default_layers import LayerDefault
from diffusers_repr.denoiser.denoiser import Denoiser
from diffusers_repr.denoiser.family import Family
from diffusers_repr.denoiser.family_registry import register_family
from diffusers_repr.denoiser.feature_map import FeatureMap
from diffusers_repr.denoiser.generic_family import GenericFamily
from diffusers_repr.denoiser.inversion import (
    DDIMStep,
    ddim_generate,
    ddim_invert,
    ddim_levels,
    ddim_update,
    inversion_error,
)
from diffusers_repr.denoiser.layers import Layer, layer_table, list_layers, list_layers_from_config
from diffusers_repr.denoiser.prior import (
    GeneratorPrior,
    HistogramPrior,
    Prior,
    QueryPrior,
    StoredPrior,
    load_prior,
)

__all__ = [
    "AttentionLayout",
    "CaptionConditioner",
    "Condition",
    "Conditioner",
    "DDIMStep",
    "Denoiser",
    "Family",
    "FeatureMap",
    "GeneratorPrior",
    "GenericFamily",
    "HistogramPrior",
    "LabelConditioner",
    "Layer",
    "LayerDefault",
    "LayoutConditioner",
    "MapConditioner",
    "Prior",
    "QueryPrior",
    "SeveralConditioner",
    "StoredPrior",
    "TokenConditioner",
    "VectorConditioner",
    "ddim_generate",
    "ddim_invert",
    "ddim_levels",
    "ddim_update",
    "families",
    "inversion_error",
    "layer_table",
    "list_layers",
    "list_layers_from_config",
    "load_prior",
    "register_block_output",
    "register_family",
]
