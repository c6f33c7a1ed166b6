"""Heads on maps: a prediction for every pixel."""
