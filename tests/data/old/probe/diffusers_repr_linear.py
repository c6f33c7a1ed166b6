"""`LinearHead` for `diffusers.AutoModel`; the class itself comes with `pip install diffusers-repr`."""

from diffusers_repr.heads import LinearHead

__all__ = ["LinearHead"]
