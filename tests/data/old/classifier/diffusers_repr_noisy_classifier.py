"""`NoisyClassifier` for `diffusers.AutoModel`; the class itself comes with `pip install diffusers-repr`."""

from diffusers_repr.models import NoisyClassifier

__all__ = ["NoisyClassifier"]
