"""Networks that diffusers lacks; plain torch and diffusers, so each saves, loads and is pushed like theirs."""

from diffusers_repr.models.class_token import ClassTokenHead
from diffusers_repr.models.feature_adapters import FeatureAdapters
from diffusers_repr.models.feature_interpreter import FeatureInterpreter
from diffusers_repr.models.film import FiLM, film_blocks
from diffusers_repr.models.gradient_unet import GradientUNet
from diffusers_repr.models.hint_encoder import HintEncoder
from diffusers_repr.models.joint_vit import JointViTModel
from diffusers_repr.models.masked_token_model import MaskedTokenModel
from diffusers_repr.models.maskgit_vq import MaskGITVQModel
from diffusers_repr.models.noisy_classifier import NoisyClassifier, describe_process
from diffusers_repr.models.null_tokens import NullTokens
from diffusers_repr.models.patch_pca import PatchPCA
from diffusers_repr.models.pixel_token_model import PixelTokenModel
from diffusers_repr.models.plain_vit import plain_vit
from diffusers_repr.models.representation_mlp import RepresentationMLPModel
from diffusers_repr.models.semantic_encoder import SemanticEncoder
from diffusers_repr.models.sit import SiTTransformer2DModel
from diffusers_repr.models.uvit import UViTTransformer2DModel
from diffusers_repr.models.vector_embedding import VectorEmbedding

__all__ = [
    "ClassTokenHead",
    "FeatureAdapters",
    "FeatureInterpreter",
    "FiLM",
    "GradientUNet",
    "HintEncoder",
    "JointViTModel",
    "MaskGITVQModel",
    "MaskedTokenModel",
    "NoisyClassifier",
    "NullTokens",
    "PatchPCA",
    "PixelTokenModel",
    "RepresentationMLPModel",
    "SemanticEncoder",
    "SiTTransformer2DModel",
    "UViTTransformer2DModel",
    "VectorEmbedding",
    "describe_process",
    "film_blocks",
    "plain_vit",
]
