"""`DepthHead` for `diffusers.AutoModel`; the class itself comes with `pip install diffusers-repr`."""

from diffusers_repr.heads import DepthHead

__all__ = ["DepthHead"]
