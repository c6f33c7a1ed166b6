"""Tiny tokenizers, one token a character: read from files, as any version of transformers can."""

from pathlib import Path

from transformers import (
    BertTokenizerFast,
    CLIPTokenizerFast,
    GemmaTokenizerFast,
    PreTrainedTokenizerFast,
    T5TokenizerFast,
)

FOLDER = Path(__file__).parents[1] / "data" / "tokenizers"


def clip_tokenizer() -> PreTrainedTokenizerFast:
    return CLIPTokenizerFast.from_pretrained(FOLDER / "clip")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    return T5TokenizerFast.from_pretrained(FOLDER / "t5")


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return GemmaTokenizerFast.from_pretrained(FOLDER / "gemma")


def bert_tokenizer() -> PreTrainedTokenizerFast:
    return BertTokenizerFast.from_pretrained(FOLDER / "bert")
