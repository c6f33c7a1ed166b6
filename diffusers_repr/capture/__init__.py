"""Run a model and keep what named layers return."""

from diffusers_repr.capture.attention import AttentionTape, AttentionTokens, attention_layers, capture_attention
from diffusers_repr.capture.attention_memory import attention_memory
from diffusers_repr.capture.capture import Tape, capture
from diffusers_repr.capture.names import check_layers, match_layers

__all__ = [
    "AttentionTape",
    "AttentionTokens",
    "Tape",
    "attention_layers",
    "attention_memory",
    "capture",
    "capture_attention",
    "check_layers",
    "match_layers",
]
