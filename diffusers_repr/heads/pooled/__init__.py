"""Heads on a vector an image."""
