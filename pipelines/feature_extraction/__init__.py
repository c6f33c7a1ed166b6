"""Features of images from the layers of any diffusion pipeline."""
