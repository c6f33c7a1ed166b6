"""Joint diffusion models: one network that denoises and classifies."""
