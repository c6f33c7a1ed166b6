"""Schedulers that diffusers lacks: each file stands alone; importable as `diffusers_repr.schedulers_ext`."""
