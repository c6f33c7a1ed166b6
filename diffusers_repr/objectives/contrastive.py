"""`ContrastiveObjective`: CLIP's two towers, trained to tell which caption belongs to which image."""

from __future__ import annotations

import dataclasses
import json
import math
import string
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizerFast, CLIPVisionConfig

from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.encoders.preprocessing import preprocess
from diffusers_repr.models.gathered import gathered
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.preprocessor import Preprocessor

_MOST_SCALE = math.log(100)  # Radford et al. 2021, section 2.5


def clip_loss(images: Tensor, texts: Tensor, scale: Tensor | float, captions: Tensor | None = None) -> Tensor:
    """CLIP's symmetric loss (Radford et al. 2021, figure 3), over the pairs of all processes.

    Args:
        images: `(B, D)`; row b belongs to row b of `texts`.
        texts: `(B, D)`.
        scale: Factor on the cosines, `exp(t)` of the paper.
        captions: `(B, L)` tokens: pairs whose captions are equal do not count as wrong for one another. None: every
            other pair is wrong, as in the paper.
    """
    own = [F.normalize(rows.float(), dim=-1) for rows in (images, texts)]
    everyone, every_caption, first = own, captions, 0
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [gathered(rows) for rows in own]
        first = dist.get_rank() * len(images)
        if captions is not None:
            every_caption = gathered(captions)
    right = first + torch.arange(len(images), device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        logits = [scale * own[side] @ everyone[1 - side].T for side in (0, 1)]
    if captions is not None and every_caption is not None:
        ignored = (captions[:, None] == every_caption[None, :]).all(-1)
        ignored[right - first, right] = False
        logits = [each.masked_fill(ignored, -torch.inf) for each in logits]
    losses = [F.cross_entropy(each, right) for each in logits]
    return (losses[0] + losses[1]) / 2


@dataclasses.dataclass(frozen=True)
class ContrastiveConfig:
    """The two towers; the fields are keys of a recipe.

    Raises:
        ValueError: If an argument of a tower is missing or unknown, or a number is out of range.
    """

    text: dict | str | None = setting(None, "arguments of CLIPTextConfig, a mapping (JSON in a flag)")
    vision: dict | str | None = setting(None, "arguments of CLIPVisionConfig, a mapping")
    embedding_dim: int = setting(128, "width of the vectors that are compared")
    vocabulary: int = setting(512, "most tokens of the tokenizer, which is trained on the captions")
    eval_splits: list[str] | None = setting(None, "splits whose captions are looked for among one another at the end")

    def __post_init__(self) -> None:
        for name, kind in (("text", CLIPTextConfig), ("vision", CLIPVisionConfig)):
            arguments = json_mapping(name, getattr(self, name))
            check_keys(f"`{name}`", arguments, kind().to_dict())
            object.__setattr__(self, name, arguments)
        text, vision = (json_mapping(name, getattr(self, name)) for name in ("text", "vision"))
        missing = [key for key in ("image_size", "patch_size") if key not in vision]
        if missing:
            raise ValueError(f"`vision` needs {', '.join(missing)}, as whole numbers.")
        if vision["image_size"] % vision["patch_size"]:
            raise ValueError(f"`vision` has image_size={vision['image_size']}, no multiple of its patch_size.")
        own = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "projection_dim"}
        given = sorted(own & (text.keys() | vision.keys()))
        if given:
            raise ValueError(f"{', '.join(given)} come from the tokenizer and from `embedding_dim`; leave them out.")
        if self.embedding_dim < 1 or self.vocabulary < 2:
            raise ValueError("`embedding_dim` and `vocabulary` must be positive.")


def caption_tokenizer(captions: Iterable[str], vocabulary: int = 512, length: int = 16) -> CLIPTokenizerFast:
    """CLIP's tokenizer with byte pairs learned from captions: frequent words become one token, any text has some.

    Args:
        captions: To learn from.
        vocabulary: Most tokens; the bytes and the two marks are among them.
        length: Tokens of a text with its marks, to which it is filled or cut.
    """
    letters = " ".join(string.ascii_lowercase + string.digits)  # so that every word ends in a token
    with tempfile.TemporaryDirectory() as folder:  # CLIP's rules without its words; transformers 4 takes files alone
        words, merges = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        words.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
        merges.write_text("#version: 0.2\n")
        rules = CLIPTokenizerFast(str(words), str(merges))
    tokenizer = rules.train_new_from_iterator([*captions, letters], vocabulary, show_progress=False)
    tokenizer.model_max_length = length
    return tokenizer


def clip_model(config: ContrastiveConfig, tokenizer: Any) -> CLIPModel:
    """A new `CLIPModel` for texts of a tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {
        **json_mapping("text", config.text),
        **ids,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
    }
    vision = json_mapping("vision", config.vision)
    towers = {name: {**tower, "projection_dim": config.embedding_dim}
              for name, tower in (("text_config", text), ("vision_config", vision))}  # fmt: skip
    return CLIPModel(CLIPConfig(**towers, projection_dim=config.embedding_dim))


class ContrastiveObjective(Objective):
    """CLIP (Radford et al. 2021, arXiv 2103.00020): the loss of `clip_loss`, with a learned scale of at most 100.

    Captions that stand twice in a batch are not held against one another. A batch has `pixel_values` and `caption`.
    Texts go into the tower as a diffusion pipeline gives them: filled up, without a mask.

    Args:
        model: Both towers.
        tokenizer: Of the text tower.
        mean: Of the images in [0, 1], one a channel: the vision tower's own preprocessing.
        std: As `mean`.
    """

    card = {"kind": "`CLIPModel`", "library_name": "transformers", "pipeline_tag": "zero-shot-image-classification",
            "tags": ["vision", "clip"]}  # fmt: skip

    def __init__(self, model: CLIPModel, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.mean, self.std = list(mean), list(std)

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """`loss`, and `scale`, the factor on the cosines."""
        ids = self.token_ids(batch["caption"]).to(batch["pixel_values"].device)
        images, texts = self.embed_images(self.model, batch["pixel_values"]), self.embed_texts(self.model, ids)
        scale = self.model.logit_scale.clamp(max=_MOST_SCALE).exp()
        return {"loss": clip_loss(images, texts, scale, ids), "scale": scale.detach()}

    def embed_images(self, model: CLIPModel, pixels: Tensor) -> Tensor:
        """`(B, D)` of images `(B, C, H, W)` in [-1, 1], not normalised."""
        size = (pixels.shape[2], pixels.shape[3])
        inputs = preprocess(pixels, size, self.mean, self.std)
        return model.visual_projection(model.vision_model(pixel_values=inputs).pooler_output)

    def embed_texts(self, model: CLIPModel, ids: Tensor) -> Tensor:
        """`(B, D)` of tokens `(B, L)`, not normalised."""
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """`(B, L)` of texts."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return self.tokenizer(list(captions), **options).input_ids

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Images and captions must be there.

        Raises:
            ValueError: Naming what is missing.
        """
        for name, setting_name in (("pixel_values", "image_column"), ("caption", "caption_column")):
            if name not in batch:
                raise ValueError(f"Contrastive training wants images with captions; name the {setting_name}.")

    def artifacts(self) -> list[Artifact]:
        """Both towers as a folder of transformers, with tokenizer and preprocessing."""
        side = dict.fromkeys(("height", "width"), self.model.config.vision_config.image_size)
        kind = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}
        return [
            ModelArtifact(self.model, "model"),
            FixedArtifact(self.tokenizer),
            FixedArtifact(Preprocessor(size=side, image_mean=self.mean, image_std=self.std, **kind)),
        ]


__all__ = ["ContrastiveConfig", "ContrastiveObjective", "caption_tokenizer", "clip_loss", "clip_model"]
