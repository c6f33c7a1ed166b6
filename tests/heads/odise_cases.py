"""A tiny CLIP, a tiny head of ODISE, and a segmenter of both."""

import json

import torch
from transformers import CLIPConfig, CLIPModel

from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads import OdiseHead
from diffusers_repr.heads.odise import Vocabulary
from diffusers_repr.tasks import OpenVocabularySegmenter, PanopticRecipe
from tests.testers.tokenizers import clip_tokenizer

WORDS = Vocabulary.of(["cat, kitten", "dog", "sky"], stuff=["sky"])
SMALL = {
    "strides": (4, 16), "pyramid_width": 32, "width": 32, "queries": 6, "encoder_layers": 1, "decoder_layers": 2,
    "heads": 2, "encoder_feedforward": 32, "decoder_feedforward": 32, "projection": 8,
}  # fmt: skip


def tiny_towers(grow=1.0):
    tokenizer = clip_tokenizer()
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**tower, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vision = {**tower, "image_size": 32, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
        for parameter in model.parameters():  # larger than at the start, so that attention matters
            parameter.data.mul_(grow)
    return ImageTextEncoder(model, tokenizer)


def tiny_head(denoiser, towers, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OdiseHead.for_base(denoiser, towers, **{**SMALL, **changes})


def segmenter_of(head, denoiser, towers, words=WORDS, batch_size=None, **how):
    recipe = PanopticRecipe.make(head, denoiser, towers, words)
    return OpenVocabularySegmenter(head, recipe, denoiser, towers, batch_size, **how)


def save_clip(towers, folder, mean=None):
    towers.model.save_pretrained(folder)
    towers.tokenizer.save_pretrained(folder)
    statistics = {} if mean is None else {"image_mean": [mean] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(statistics))
