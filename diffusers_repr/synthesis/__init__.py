"""Generated images as training data: variants of images, also by their scribbles, and images of classes."""

from diffusers_repr.models.controlnet import load_controlnet
from diffusers_repr.synthesis.guidance_scales import GuidanceSampler, PerImageScale
from diffusers_repr.synthesis.hints import HintMaker
from diffusers_repr.synthesis.makers import ClassMaker, GenerativeAugmenter, ImageMaker, PromptMaker
from diffusers_repr.synthesis.prompts import PromptSampler
from diffusers_repr.synthesis.recipe import GenerationRecipe, open_maker, read_generation
from diffusers_repr.synthesis.variations import RepresentationAugmenter, UnCLIPAugmenter

__all__ = [
    "ClassMaker",
    "GenerationRecipe",
    "GenerativeAugmenter",
    "GuidanceSampler",
    "HintMaker",
    "ImageMaker",
    "PerImageScale",
    "PromptMaker",
    "PromptSampler",
    "RepresentationAugmenter",
    "UnCLIPAugmenter",
    "load_controlnet",
    "open_maker",
    "read_generation",
]
