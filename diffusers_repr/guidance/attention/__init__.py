"""Attention calls taken apart: queries, keys and values, and what a perturbation makes of them."""
