"""Settings as dataclasses: read from YAML recipes and from flags."""

from diffusers_repr.config.recipe import parse_recipe

__all__ = ["parse_recipe"]
