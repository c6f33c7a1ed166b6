"""`OpenVocabularySegmenter`: segments of images under any names, by a trained head of ODISE on its base."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.encoders.image_text import ImageTextEncoder
from diffusers_repr.heads import OdiseHead
from diffusers_repr.heads.odise.vocabulary import Vocabulary
from diffusers_repr.hub import resolve_folder
from diffusers_repr.objectives.odise import OdiseConfig
from diffusers_repr.tasks import files
from diffusers_repr.tasks import panoptic_fit as fitting
from diffusers_repr.tasks.folder_task import FolderTask
from diffusers_repr.tasks.formats import PANOPTIC
from diffusers_repr.tasks.panoptic_clip import check_clip, open_clip
from diffusers_repr.tasks.panoptic_output import PanopticOutput
from diffusers_repr.tasks.panoptic_predictor import PanopticPredictor
from diffusers_repr.tasks.panoptic_recipe import PanopticRecipe
from diffusers_repr.tasks.panoptic_training import train_segmenter

if TYPE_CHECKING:
    from diffusers_repr.training import TrainingConfig


class OpenVocabularySegmenter(FolderTask):
    """Panoptic segmentation by names in words (ODISE, arXiv 2303.04803): a trained head, its base, and CLIP.

    Each mask is classified twice, by the head and by CLIP's own vector of it (MaskCLIP); a class whose names were
    learned trusts the head more, another CLIP. Made by `examples/train_odise.py`, `fit` or `from_pretrained`.

    Args:
        head: The trained head.
        recipe: What it was trained with: base, CLIP, vocabulary, prompts.
        denoiser: The frozen text-to-image model.
        towers: The CLIP.
        batch_size: Windows read at a time; all of an image if None.
        weights: CLIP's share for classes of the training and for new ones, 0 leaves it out; those of the recipe if
            None.
        template: Of the prompts, with `{}` for the name; that of the recipe if None.

    Raises:
        TypeError, ValueError: For a base or a CLIP that is not the head's, and weights outside of [0, 1].
    """

    FORMAT = PANOPTIC
    head: OdiseHead
    recipe: PanopticRecipe

    def __init__(
        self,
        head: OdiseHead,
        recipe: PanopticRecipe,
        denoiser: Denoiser,
        towers: ImageTextEncoder,
        batch_size: int | None = None,
        *,
        weights: Sequence[float] | None = None,
        template: str | None = None,
    ) -> None:
        head.check_base(denoiser)
        check_clip(towers, recipe.clip)
        super().__init__(head, recipe, denoiser)
        self.towers = towers
        self.predictor = PanopticPredictor(
            self.head,
            denoiser,
            towers,
            recipe.words,
            recipe.weights if weights is None else tuple(weights),
            recipe.template if template is None else template,
            batch_size,
        )

    @classmethod
    def fit(
        cls,
        source: Any,
        train: Any,
        validation: Any = None,
        *,
        clip: ImageTextEncoder | str | os.PathLike[str] | None = None,
        training: TrainingConfig | None = None,
        **settings: Any,
    ) -> OpenVocabularySegmenter:
        """Train a head on images with panoptic masks, by the loop of `diffusers_repr.training`.

        Args:
            source: A `Denoiser` or a diffusers pipeline.
            train: `PanopticTrainData`.
            validation: The same, or `(images, maps)`, to measure on.
            clip: The CLIP, or its folder or Hub id.
            training: The run: folder, steps, learning rate and so on; the same again goes on from its checkpoint.
            **settings: Of `OdiseConfig`: `head`, `template`, `synonyms`, `points`.

        Raises:
            TypeError, ValueError: For a base without text or maps, and settings that do not exist or fit.
        """
        if clip is None or training is None:
            raise ValueError(
                "Pass clip=..., the CLIP whose vectors name segments, and training=TrainingConfig(output_dir=...)."
            )
        denoiser = source if isinstance(source, Denoiser) else Denoiser.from_pipe(source)
        towers = clip if isinstance(clip, ImageTextEncoder) else ImageTextEncoder.from_pretrained(clip)
        odise = OdiseConfig(denoiser.name or "a model without a name", clip=towers.name or "a CLIP", **settings)
        training = dataclasses.replace(training, eval_batch_size=0)  # a head has no samples
        train_segmenter(denoiser, towers, train, odise, training)
        made = cls.from_pretrained(training.output_dir, denoiser, towers)
        if validation is not None:
            made.evaluate(validation)
        return made

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        base: Any = None,
        clip: ImageTextEncoder | str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        base_revision: str | None = None,
        token: str | None = None,
        batch_size: int | None = None,
        weights: Sequence[float] | None = None,
        template: str | None = None,
        **kwargs: Any,
    ) -> OpenVocabularySegmenter:
        """What `save_pretrained` or `examples/train_odise.py` wrote, with its base and its CLIP.

        Args:
            id_or_folder: Folder or Hub id of the segmenter.
            base: A folder, Hub id, pipeline or `Denoiser` in place of the recorded base.
            clip: An `ImageTextEncoder`, folder or Hub id in place of the recorded CLIP.
            revision: Of the segmenter.
            base_revision: Of `base`.
            token: Hub token.
            batch_size: As the class.
            weights: As the class.
            template: As the class.
            **kwargs: For loading the base (`dtype`, `variant`, ...).

        Raises:
            FileNotFoundError: If there is no such folder, segmenter, base or CLIP.
            OSError: If the Hub does not give one of them.
            ValueError: If a file is damaged, or base or CLIP are not those of the training.
        """
        if token is not None:
            kwargs["token"] = token
        head, recipe, denoiser = files.load(PANOPTIC, id_or_folder, base, revision, base_revision, token, kwargs)
        folder = resolve_folder(id_or_folder, revision, token, [PANOPTIC.file])
        towers = open_clip(recipe.clip, folder, clip, token)
        return cls(head, recipe, denoiser, towers, batch_size, weights=weights, template=template)

    def save_pretrained(self, folder: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write `config.json` and weights of the head, `panoptic.json` and a model card, all or nothing.

        Args:
            folder: A new or empty folder, or one with a segmenter that `save_pretrained` wrote, which is replaced.
            title: Heading of the card; the folder's name if None.

        Raises:
            FileExistsError: If the folder holds something else, also a training run with its checkpoints.
            OSError: If the disk is full or the folder cannot be written.
        """
        if (Path(folder) / "loss.jsonl").is_file():
            raise FileExistsError(
                f"{str(folder)!r} holds a training run, which loads as it is; saving would replace its checkpoints "
                "and logs. Choose another folder."
            )
        super().save_pretrained(folder, title=title)

    def push_to_hub(self, repo_id: str, *, clip: str | None = None, **options: Any) -> str:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: `"user/name"`.
            clip: Hub id to write as the CLIP, where it was a folder.
            **options: As of every task: `base`, `base_revision`, `private`, `token`, `revision`, `commit_message`.

        Returns:
            Address of the commit.

        Raises:
            HubError: If the Hub does not take it.
        """
        return self._push(self.recipe if clip is None else self.recipe.with_clip(clip), repo_id, **options)

    def __call__(
        self,
        images: Any,
        vocabulary: Vocabulary | Sequence[str | Sequence[str]] | None = None,
        *,
        short_side: int | None = None,
        overlap: float = 0.8,
        threshold: float = 0.0,
    ) -> PanopticOutput:
        """Segment images.

        Args:
            images: PIL images, numpy arrays or tensors of any size.
            vocabulary: What may be on them: a `Vocabulary`, or names with synonyms parted by commas; that of the
                training if None.
            short_side: Length to which the shorter side is brought, the aspect kept (1024 in the paper, with a base of
                512); None: as it is.
            overlap: As in `panoptic_inference`.
            threshold: As in `panoptic_inference`.

        Raises:
            ValueError: Without images; for names that are none, that stand twice, or of which the tokenizer makes
                nothing.
        """
        options: dict[str, Any] = {"short_side": short_side, "overlap": overlap, "threshold": threshold}
        return self.predictor(images, self._words(vocabulary, None), **options)

    def evaluate(
        self,
        data: Any,
        vocabulary: Vocabulary | Sequence[str | Sequence[str]] | None = None,
        *,
        record: bool = True,
        dataset: str | None = None,
        split: str | None = None,
        **options: Any,
    ) -> dict[str, float]:
        """Panoptic quality and mean IoU on annotated images.

        Args:
            data: `PanopticTrainData`, or `(images, maps)` with a `PanopticMap` an image, of its size.
            vocabulary: By which the classes of the maps are numbered; the names of the data, or those of the training,
                if None.
            record: Keep the scores in the recipe, so that they are saved and stand in the card.
            dataset: Name to record; that of the data if None.
            split: Split to record; that of the data if None.
            **options: As in a call.

        Returns:
            `pq`, `sq`, `rq` and `mean_iou`, means over the classes that occur; `pq_known` and `pq_new`, of those whose
            names the training had and had not, where such occur; `rows`.

        Raises:
            ImportError: Without torchmetrics.
            ValueError: As a call; for sizes and classes that do not fit.
        """
        images, truth, place = fitting.opened(data)
        result = self.predictor.measure(images, truth, self._words(vocabulary, data), **options)
        if record:
            scores = fitting.scores_of(result, dataset or place[0], split or place[1])
            self.recipe = self.recipe.with_scores(scores)
        return result

    def to(self, device: str | torch.device) -> Self:
        """Move the base model, the head and CLIP."""
        self.towers.model.to(device)
        return super().to(device)

    def __repr__(self) -> str:
        recipe = self.recipe
        return (
            f"OpenVocabularySegmenter({self.head.config['queries']} queries, trained on {len(recipe.vocabulary)} "
            f"classes, base={recipe.base.name!r}, clip={recipe.clip.name!r})"
        )

    def _words(self, vocabulary: Any, data: Any) -> Vocabulary:
        if vocabulary is None:
            return fitting.words_of(data, self.recipe.words)
        return vocabulary if isinstance(vocabulary, Vocabulary) else Vocabulary.of(vocabulary)


__all__ = ["OpenVocabularySegmenter"]
