"""Frozen networks that turn images into features: of transformers, of denoisers, or any of one's own."""

from diffusers_repr.encoders.encoder import Encoder
from diffusers_repr.encoders.family import (
    BackboneFamily,
    EncoderFamily,
    list_encoder_families,
    register_encoder_family,
)
from diffusers_repr.encoders.loading import load_encoder, load_encoders
from diffusers_repr.encoders.output import EncoderOutput
from diffusers_repr.encoders.protocol import AttentionEncoder, EncoderInfo, ImageEncoder

__all__ = [
    "AttentionEncoder",
    "BackboneFamily",
    "Encoder",
    "EncoderFamily",
    "EncoderInfo",
    "EncoderOutput",
    "ImageEncoder",
    "list_encoder_families",
    "load_encoder",
    "load_encoders",
    "register_encoder_family",
]
