"""What a network is conditioned on: labels, captions, vectors, tokens, maps."""

from diffusers_repr.denoiser.conditioner.base import Conditioner
from diffusers_repr.denoiser.conditioner.captions import CaptionConditioner
from diffusers_repr.denoiser.conditioner.default import bare_conditioner, default_conditioner
from diffusers_repr.denoiser.conditioner.labels import LabelConditioner
from diffusers_repr.denoiser.conditioner.layouts import LayoutConditioner
from diffusers_repr.denoiser.conditioner.several import SeveralConditioner
from diffusers_repr.denoiser.conditioner.tensors import MapConditioner, TokenConditioner, VectorConditioner

__all__ = [
    "CaptionConditioner",
    "Conditioner",
    "LabelConditioner",
    "LayoutConditioner",
    "MapConditioner",
    "SeveralConditioner",
    "TokenConditioner",
    "VectorConditioner",
    "bare_conditioner",
    "default_conditioner",
]
