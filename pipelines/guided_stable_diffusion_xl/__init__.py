"""Stable Diffusion XL with guidance."""
