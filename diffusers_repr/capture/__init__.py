"""Run a model and keep what named layers return."""

from diffusers_repr.capture.attention import AttentionTape, AttentionTokens, attention_layers, capture_attention
from diffusers_repr.capture.attention_memory import attention_memory
from diffusers_repr.capture.capture import Tape, capture
from diffusers_repr.capture.feedback import FeedbackPasses, FirstPass
from diffusers_repr.capture.names import check_layers, match_layers
from diffusers_repr.capture.persistent import PersistentCapture
from diffusers_repr.capture.unet_halves import UNetFeatures, bottleneck, decode_partial, encode_partial

__all__ = [
    "AttentionTape",
    "AttentionTokens",
    "FeedbackPasses",
    "FirstPass",
    "PersistentCapture",
    "Tape",
    "UNetFeatures",
    "attention_layers",
    "attention_memory",
    "bottleneck",
    "capture",
    "capture_attention",
    "check_layers",
    "decode_partial",
    "encode_partial",
    "match_layers",
]
