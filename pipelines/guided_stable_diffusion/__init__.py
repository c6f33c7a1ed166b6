"""Stable Diffusion with guidance."""
