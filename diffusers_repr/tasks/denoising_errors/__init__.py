"""Errors of a conditional denoiser, and rules that find by them what an image is: what zero-shot tasks stand on."""
