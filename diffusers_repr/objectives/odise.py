"""`OdiseObjective`: the head of ODISE, trained on panoptic masks; base and CLIP are frozen."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.data.panoptic_data import to_maps
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads.odise.head import OdiseHead
from diffusers_repr.heads.odise.vocabulary import TEMPLATE, Vocabulary
from diffusers_repr.hub.places import without_places
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig
from diffusers_repr.objectives.odise_loss import QueryLoss

_FOUND = ("self", "taps", "prompt_shape", "time_width", "text_dim")


@dataclasses.dataclass(frozen=True)
class OdiseConfig(FrozenBaseConfig):
    """The frozen base and CLIP, and the head."""

    pretrained_model_name_or_path: str | None = setting(None, "text-to-image pipeline folder or Hub id, frozen")
    clip: str | None = setting(None, "folder or Hub id of a CLIPModel, frozen")
    head: dict | str | None = setting(None, "arguments of OdiseHead, a mapping (JSON in a flag)")
    template: str = setting(TEMPLATE, "of the prompts, with {} for the name of the class")
    synonyms: dict | str | None = setting(None, "class -> list of further names, a mapping")
    points: int = setting(12_544, "of each mask, at which its loss is taken")
    eval_splits: list[str] | None = setting(None, "splits whose panoptic quality is measured at the end")
    eval_images: int = setting(256, "images of each, the first")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is None:
            raise ValueError("Pass --clip, a folder or a Hub id.")
        allowed = [n for n in inspect.signature(OdiseHead.__init__).parameters if n not in _FOUND]
        arguments = json_mapping("head", self.head)
        check_keys("`head`", arguments, allowed)
        object.__setattr__(self, "head", arguments)
        object.__setattr__(self, "synonyms", json_mapping("synonyms", self.synonyms))

    def vocabulary(self, names: Sequence[str], stuff: Sequence[str] = ()) -> Vocabulary:
        """The classes with their synonyms.

        Raises:
            ValueError: For synonyms of what is no class, and names that stand twice.
        """
        synonyms = cast(Mapping[str, Any], self.synonyms)
        check_keys("`synonyms`", synonyms, names)
        return Vocabulary.of([[name, *synonyms.get(name, ())] for name in names], stuff)


class OdiseObjective(Objective):
    """The loss of Mask2Former on the masks and classes that an `OdiseHead` gives, in every layer of its decoder.

    A batch has `pixel_values` in [-1, 1], `panoptic` (B, H, W), the id of every pixel's segment from 1 (0: void), and
    `segment_classes` (B, S), the class of each.

    Args:
        denoiser: The base, from a pipeline with text.
        towers: CLIP.
        vocabulary: Of the data.
        config: The head.

    Attributes:
        beside: What is saved in the folder of the head, such as the recipe by which it is a task.
    """

    def __init__(
        self, denoiser: Denoiser, towers: ImageTextEncoder, vocabulary: Vocabulary, config: OdiseConfig
    ) -> None:
        super().__init__()
        self.denoiser, self.towers, self.vocabulary, self.config = denoiser, towers, vocabulary, config
        self.freeze_base(denoiser)
        self.freeze("clip", towers.model)
        self.head = OdiseHead.for_base(denoiser, towers, **json_mapping("head", config.head))
        self.beside: tuple[FixedArtifact, ...] = ()
        towers.check_words([name for names in vocabulary.classes for name in names])
        self.texts = towers.embed_texts(vocabulary.prompts(config.template))
        self.loss = QueryLoss(len(vocabulary.classes), config.points)
        self.card = self.about()

    def about(self) -> dict[str, Any]:
        """What the card tells."""
        base = str(self.config.pretrained_model_name_or_path)
        text = (
            f"It gives segments of images names in words (ODISE, arXiv 2303.04803), read from `{without_places(base)}`"
        )
        text += f" and a CLIP, both frozen. Trained on {len(self.vocabulary.classes)} classes: "
        text += ", ".join(self.vocabulary.names) + ". `OpenVocabularySegmenter` of `diffusers_repr.tasks` uses it."
        return {"kind": "`OdiseHead`", "text": text, "tags": ["odise", "image-segmentation"],
                "pipeline_tag": "image-segmentation", "base_model": self.config.public_base}  # fmt: skip

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Panoptic masks must be there.

        Raises:
            ValueError: If they are not.
        """
        if "panoptic" not in batch or "segment_classes" not in batch:
            raise ValueError("ODISE is trained on panoptic masks: `panoptic` and `segment_classes` of each image.")

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch, and its terms."""
        levels = self.head.levels(self.denoiser, self.towers, batch["pixel_values"])
        masks, logits = self.head(levels, self.texts.to(levels[0].device), self.vocabulary.counts, return_dict=False)
        return self.loss(masks, logits, to_maps(batch["panoptic"], batch["segment_classes"]))

    def artifacts(self) -> Sequence[Artifact]:
        """The head as the folder itself, and what is saved beside it."""
        return [ModelArtifact(self.head, "head"), *self.beside]


__all__ = ["OdiseConfig", "OdiseObjective"]
