"""Run a model and keep what named layers return."""

from diffusers_repr.capture.capture import Tape, capture
from diffusers_repr.capture.names import check_layers, match_layers

__all__ = ["Tape", "capture", "check_layers", "match_layers"]
