"""Networks that diffusers lacks; plain torch and diffusers, so each saves, loads and is pushed like theirs."""

from diffusers_repr.models.noisy_classifier import NoisyClassifier, describe_process

__all__ = ["NoisyClassifier", "describe_process"]
