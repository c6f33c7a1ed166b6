"""`ImageTextEncoder`: both towers of CLIP, frozen: vectors of texts, of images, and of masks in images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizerFast

from diffusers_repr.denoiser.hooks import Hooks
from diffusers_repr.encoders.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    Statistics,
    check_processor,
    preprocess,
    statistics_from_processor,
)
from diffusers_repr.hub.identity import weights_hash
from diffusers_repr.hub.load import load_json_config
from diffusers_repr.hub.schema import printable

_MOST_SCALE = 100.0  # Radford et al. 2021, section 2.5


class ImageTextEncoder:
    """Vectors that can be compared: of texts, of whole images, and of parts of images.

    Args:
        model: A `CLIPModel` of transformers.
        tokenizer: Of its texts.
        mean: Of the images in [0, 1] that it was trained on, one a channel.
        std: As `mean`.
        name: Folder or Hub id it was loaded from.
        revision: As it was given.

    Raises:
        TypeError: For another model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
        name: str | None = None,
        revision: str | None = None,
    ) -> None:
        if type(model).__name__ != "CLIPModel":
            raise TypeError(f"Both towers of CLIP are needed, a CLIPModel; got {type(model).__name__}.")
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.mean, self.std = tuple(mean), tuple(std)
        self.name, self.revision = name, revision

    @classmethod
    def from_pretrained(
        cls, id_or_folder: str | os.PathLike[str], revision: str | None = None, token: str | None = None
    ) -> ImageTextEncoder:
        """A CLIP with its tokenizer, from a folder or Hub id of transformers, in float32.

        Args:
            id_or_folder: With `config.json`, weights as safetensors, the tokenizer, and `preprocessor_config.json`, of
                which mean and std are read.
            revision: Branch, tag or commit on the Hub.
            token: Hub token.

        Raises:
            FileNotFoundError: If a file is missing.
            TypeError: For another model.
            ValueError: For a damaged file.
        """
        config = load_json_config(id_or_folder, "config.json", revision, token)
        if config.get("model_type") != "clip":
            kind = printable(str(config.get("model_type")))
            raise TypeError(f"Both towers of CLIP are needed, a CLIPModel; {str(id_or_folder)!r} is a {kind!r}.")
        file = "preprocessor_config.json"
        processor = check_processor(load_json_config(id_or_folder, file, revision, token), file)
        found = statistics_from_processor(processor, Statistics(CLIP_MEAN, CLIP_STD))
        place = {"revision": revision, "token": token}
        model = CLIPModel.from_pretrained(id_or_folder, use_safetensors=True, dtype=torch.float32, **place)
        tokenizer = CLIPTokenizerFast.from_pretrained(id_or_folder, **place)
        return cls(model, tokenizer, found.mean, found.std, os.fspath(id_or_folder), revision)

    @property
    def dim(self) -> int:
        """Values of a vector."""
        return int(self.model.config.projection_dim)

    @property
    def channels(self) -> int:
        """Channels of the images it takes."""
        return 3

    def to(self, device: str | torch.device | None = None) -> ImageTextEncoder:
        """Move both towers; returns the encoder itself."""
        nn.Module.to(self.model, device=device)
        return self

    def fingerprint(self) -> dict[str, Any]:
        """What decides the vectors, as JSON values: equal for encoders whose vectors are the same."""
        return {
            "encoder": "image-text",
            "name": self.name,
            "revision": self.revision,
            "image_size": self.model.config.vision_config.image_size,
            "mean": list(self.mean),
            "std": list(self.std),
            "weights": weights_hash(self.model),
        }

    @property
    def scale(self) -> float:
        """What the towers' cosines are multiplied by in training."""
        return min(float(self.model.logit_scale.exp()), _MOST_SCALE)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """`(N, dim)` float32, not normalised.

        Raises:
            TypeError: For one text in place of a list.
            ValueError: For a text of which the tokenizer makes nothing; the empty text alone may be empty.
        """
        if isinstance(texts, str):
            raise TypeError(f"A list of texts is needed; got the text {texts!r}.")
        self.check_words([text for text in texts if text])
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(list(texts), **options).input_ids.to(self._device)
        return self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output).float()

    def check_words(self, words: Sequence[str]) -> None:
        """Refuse words that say nothing to CLIP, alone or in a prompt.

        Raises:
            ValueError: For one of which the tokenizer makes nothing, or only the token of what it does not know.
        """
        unknown = self.tokenizer.unk_token_id
        for word in words:
            ids = self.tokenizer(word, add_special_tokens=False).input_ids
            if all(number == unknown for number in ids):
                raise ValueError(
                    f"The tokenizer of this CLIP makes no token of {word!r}; name the class in words it knows."
                )

    @torch.no_grad()
    def embed_images(self, pixels: Tensor) -> Tensor:
        """`(B, dim)` float32 of `(B, 3, H, W)` in [-1, 1], not normalised."""
        return self.model.visual_projection(self._tower(self._prepared(pixels)).pooler_output).float()

    @torch.no_grad()
    def embed_masks(self, pixels: Tensor, masks: Tensor) -> Tensor:
        """MaskCLIP (Ding et al. 2023, arXiv 2208.08984): a vector of each mask, in one pass for all of an image.

        Each mask has a copy of the class token, which attends to the class token itself and to the patches in which
        the mask is somewhere at least 0.5 probable; to the copies nothing attends, not even they themselves. So a mask
        over the whole image has the image's own vector, and masks do not change one another's.

        Args:
            pixels: `(B, 3, H, W)` in [-1, 1].
            masks: Probabilities `(B, Q, h, w)`, of any size.

        Returns:
            `(B, Q, dim)` float32, not normalised.
        """
        prepared, count = self._prepared(pixels), masks.shape[1]
        patch = self.model.config.vision_config.patch_size
        sized = functional.interpolate(masks.float(), tuple(prepared.shape[2:]), mode="bilinear", align_corners=False)
        seen = functional.max_pool2d(sized, patch).flatten(2) >= 0.5  # (B, Q, N)
        tokens = 1 + seen.shape[2] + count
        bias = torch.zeros(len(prepared), 1, tokens, tokens, dtype=self.model.dtype, device=self._device)
        bias[..., -count:] = -torch.inf
        bias[:, 0, -count:, 1:-count].masked_fill_(~seen.to(self._device), -torch.inf)
        tower = self.model.vision_model

        def append(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            return torch.cat([output, output[:, :1].expand(-1, count, -1)], dim=1)

        def mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": bias}

        with ExitStack() as stack:
            hooks = Hooks(stack)
            hooks.after(tower.embeddings, append)
            hooks.before(tower.encoder, mask)
            hidden = self._tower(prepared).last_hidden_state[:, -count:]
        return self.model.visual_projection(tower.post_layernorm(hidden)).float()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _tower(self, prepared: Tensor) -> Any:
        return self.model.vision_model(pixel_values=prepared.to(self.model.dtype))

    def _prepared(self, pixels: Tensor) -> Tensor:
        side = self.model.config.vision_config.image_size
        return preprocess(pixels.to(self._device), (side, side), self.mean, self.std)


__all__ = ["ImageTextEncoder"]
