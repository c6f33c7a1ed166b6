"""`RepresentationProbe`: a linear head on an encoder, and the whole evaluation of the encoder beside its baselines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from diffusers_repr.data.attributed import AttributedImages
from diffusers_repr.data.labelled import Labelled
from diffusers_repr.encoders import Encoder, load_encoder
from diffusers_repr.heads import LinearHead, fit_head
from diffusers_repr.hub.files import atomic_folder
from diffusers_repr.metrics.encoding import encode_images, pick
from diffusers_repr.sweep.finetune_probe import FinetuneProtocol
from diffusers_repr.sweep.representation import BASELINES, ProbeSettings, measure_representation
from diffusers_repr.tasks import representation_files as files
from diffusers_repr.tasks.images import class_accuracies, class_data
from diffusers_repr.tasks.reconstruction import is_codec, measure_reconstruction
from diffusers_repr.tasks.task import Task


class RepresentationProbe(Task):
    """Classes of images by a linear head on an encoder's vector.

    `evaluate` measures the representation, not the head alone: linear, k-shot and k-NN probes, fine-tuning if asked
    for, DCI and TAD of attributes, each beside raw pixels, the untrained network and other encoders.

    Args:
        encoder: What is evaluated.
        head: On its vectors.
        recipe: What `representation.json` holds, the encoder apart.
        train: What it was fitted to; None once it was loaded: then the head alone is measured.
        validation: Likewise.
        beside: Encoders and baselines that stand beside it.
        batch_size: Images a forward.
        seed: Of draws and of the untrained network.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: LinearHead,
        recipe: dict[str, Any],
        train: Labelled | None = None,
        validation: Labelled | None = None,
        beside: Sequence[str | Encoder] = (),
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.encoder, self.head, self.recipe, self.batch_size = encoder, head.eval(), recipe, batch_size
        self.seed = seed
        self.train, self.validation, self.beside = train, validation, list(beside)
        self.denoiser = None  # type: ignore[assignment]

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        source: Encoder,
        train: Any,
        validation: Any = None,
        *,
        beside: list[str] | None = None,
        features: Literal["global", "tokens"] = "global",
        protocol: str | None = None,
        image_size: int | list[int] | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> Self:
        """Encode the training images and fit the linear head.

        Args:
            source: The encoder.
            train: Images with class ids.
            validation: The same, to tune penalties on.
            beside: `pixels`, `random`, and names of other encoders (`load_encoder`); None: the first two.
            features: `global`, or the mean of the `tokens`.
            protocol: How linear probes are fitted, see `PROTOCOLS`.
            image_size: One side, or height and width, to which all images are resized first.
            batch_size: Images a forward.
            seed: Of fitting.

        Raises:
            TypeError: If the source is no encoder.
            ValueError: For images and labels that do not fit; an unknown baseline.
        """
        if not isinstance(source, Encoder):
            raise TypeError(
                f"A representation is evaluated of an Encoder; got {type(source).__name__}. `load_encoder` opens "
                "folders, Hub ids and MODEL:layer@timestep."
            )
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        told = {
            "features": features, "image_size": None if size is None else list(size), "protocol": protocol,
        }  # fmt: skip
        data = class_data(train, "train")
        held = None if validation is None else class_data(validation, "validation")
        named = list(BASELINES) if beside is None else beside
        others = [one if one in BASELINES else load_encoder(one) for one in named]
        shown = [one if isinstance(one, str) else one.name for one in others]
        recipe: dict[str, Any] = {**told, "label_names": data.label_names, "beside": shown, "scores": {}}
        made = cls(source, LinearHead(1, 2), recipe, data, held, others, batch_size, seed)
        pair = None if held is None else (made.vectors(held), held.targets)
        generator = torch.Generator().manual_seed(seed)
        fitted = fit_head(made.vectors(data), data.targets, protocol=protocol, validation=pair, generator=generator)
        assert isinstance(fitted.head, LinearHead)
        made.head = fitted.head.eval()
        return made

    def vectors(self, images: Any) -> Tensor:
        """The encoder's vectors `(N, D)` of images, on the CPU."""
        size = None if self.recipe["image_size"] is None else tuple(self.recipe["image_size"])
        how: dict[str, Any] = {"image_size": size, "batch_size": self.batch_size}
        return encode_images(self.encoder, images, self.recipe["features"], **how).features

    @torch.no_grad()
    def __call__(self, images: Any) -> Tensor:
        """Probabilities `(N, K)` of the classes.

        Args:
            images: As `Encoder` takes them; a list may hold several sizes if there is an `image_size`.
        """
        if self.recipe["image_size"] is None:
            vectors = pick(self.encoder(images, self.batch_size), self.recipe["features"])
        else:
            vectors = self.vectors(images)
        return self.head(vectors.to(self.head.mean.device)).softmax(1)

    def evaluate(
        self,
        data: Any,
        *,
        record: bool = True,
        probes: list[str] | None = None,
        shots: int = 5,
        draws: int = 5,
        k: int = 20,
        finetune_epochs: int = 0,
        predictor: Literal["forest", "boosting", "lasso"] = "forest",
        reconstruction_steps: int = 0,
        reconstruction_images: int = 500,
        judge: str | None = None,
        seed: int | None = None,
    ) -> dict[str, float]:
        """`linear` of the fitted head, and every other score, those of what stands beside it as `score: name`.

        Of the folder of a diffusion autoencoder also what comes back of images, see `measure_reconstruction`.

        Args:
            data: Images with class ids; with attributes, those too (see `AttributedImages`).
            record: Keep the scores.
            probes: Of `linear`, `few_shot`, `knn`; all if None.
            shots: Labels a class of `few_shot`.
            draws: Of `few_shot`.
            k: Neighbours of `knn`.
            finetune_epochs: Passes of the fine-tuning probe; 0 leaves it out.
            predictor: Of DCI.
            reconstruction_steps: Of DDIM, both ways; 0 reconstructs nothing.
            reconstruction_images: The first of the data, that many.
            judge: Name of an encoder whose features reconstructions are compared by; none if None.
            seed: Of draws and of the untrained network; that of fitting if None.

        Raises:
            ValueError: For images and labels that do not fit, more shots or neighbours than there are, and a base
                that is to reconstruct and cannot.
        """
        place = self.encoder.place
        if reconstruction_steps and (place is None or not is_codec(place)):
            raise ValueError(
                f"reconstruction_steps={reconstruction_steps}: {self.encoder.name!r} is no folder of a diffusion "
                "autoencoder, and reconstructs nothing. Leave it out."
            )
        test = class_data(data, "test")
        found = class_accuracies(self.head(self.vectors(test)).argmax(1), test.targets)
        scores = {"linear": found["accuracy"], "linear_balanced": found["balanced_accuracy"], "rows": len(test)}
        if self.train is not None:
            named = tuple(probes) if probes is not None else ("linear", "few_shot", "knn")
            finetune = FinetuneProtocol(epochs=finetune_epochs) if finetune_epochs else FinetuneProtocol()
            settings = ProbeSettings(
                named + ("finetune",) * bool(finetune_epochs), shots, draws, k, self.recipe["protocol"], finetune,
                self.recipe["features"], predictor, self.seed if seed is None else seed,
            )  # fmt: skip
            whole = measure_representation(
                self.encoder, self.train, test, self.validation, beside=self.beside, settings=settings,
                attributes=_attributes(self.train, test), image_size=self._size(), batch_size=self.batch_size,
            )  # fmt: skip
            scores = {**scores, **{key: value for key, value in whole.flat().items() if key != "linear"}}
        if reconstruction_steps:
            scores |= self._reconstruction(test, reconstruction_steps, reconstruction_images, judge, seed)
        if record:
            self.recipe = {**self.recipe, "scores": {name: float(value) for name, value in scores.items()}}
        return scores

    def _reconstruction(
        self, test: Labelled, steps: int, count: int, judge: str | None, seed: int | None
    ) -> dict[str, float]:
        """What comes back of the first images."""
        assert self.encoder.place is not None
        size, channels = self._size(), self.encoder.channels
        parts = test.pixels(self.batch_size, channels, size, range(min(count, len(test))))
        images = torch.cat([pixels for _, pixels in parts]) / 2 + 0.5
        encoder = None if judge is None else load_encoder(judge)
        settings: dict[str, Any] = {"steps": steps, "batch_size": self.batch_size}
        return measure_reconstruction(
            self.encoder.place, images, encoder=encoder, seed=self.seed if seed is None else seed, **settings
        )

    def _size(self) -> tuple[int, int] | None:
        size = self.recipe["image_size"]
        return None if size is None else (size[0], size[1])

    def card(self, title: str) -> str:
        """What it is, and a table of what was measured.

        Args:
            title: Heading.
        """
        return files.card(self._told(), files.EncoderPlace.of(self.encoder, None), title)

    def _told(self) -> dict[str, Any]:
        return {key: value for key, value in self.recipe.items() if key != "protocol"}

    def save_pretrained(self, folder: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write the head, `representation.json` and a card, all or nothing; of the encoder, where it is found.

        Args:
            folder: A new or empty folder, or one of the same kind, which is replaced.
            title: Heading of the card; the folder's name if None.

        Raises:
            FileExistsError: If it holds something else.
        """
        place = Path(folder)
        if place.is_dir() and any(place.iterdir()) and not (place / files.FILE).is_file():
            raise FileExistsError(f"{str(folder)!r} is not empty and holds no {files.FILE}. Choose another folder.")
        encoder = files.EncoderPlace.of(self.encoder, place)
        with atomic_folder(place) as fresh:
            files.write(fresh, self.head, self._told(), encoder, title or Path(os.path.abspath(place)).name)

    def push_to_hub(
        self, repo_id: str, *, base: str | None = None, base_revision: str | None = None, **options: Any
    ) -> str:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: `"user/name"`.
            base: Hub id to write as the encoder's, where that is a folder.
            base_revision: Goes with `base`.
            **options: Of `push_folder`: `private`, `token`, `revision`, `commit_message`.

        Returns:
            Address of the commit.

        Raises:
            HubError: If the Hub does not take it.
            ValueError: If `base` is no Hub id.
        """
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            files.write(place, self.head, self._told(), files.EncoderPlace.of(self.encoder, place), repo_id)
            options = {"commit_message": f"Upload {files.NOUN} with diffusers-repr", **options}
            return files.push(place, repo_id, base, base_revision, **options)

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | os.PathLike[str],
        base: Any = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> Self:
        """Load what `save_pretrained` wrote, with its encoder.

        Args:
            id_or_folder: A folder or a Hub id.
            base: The encoder, or its name, in place of the recorded one.
            revision: Of the Hub id.
            token: Hub token, of a private one.
            batch_size: Images a forward.
            **kwargs: Of `load_encoder`.

        Raises:
            FileNotFoundError: If the folder, or its encoder, is not there.
            HubError: If the Hub has neither, or is not reached.
            ValueError: If a file is damaged, or the encoder has other weights.
        """
        folder, place, told = files.read(id_or_folder, revision, token)
        if base is None and place.revision is not None:
            kwargs = {"revision": place.revision, **kwargs}
        encoder = base if isinstance(base, Encoder) else load_encoder(base or place.found(folder), **kwargs)
        weights = encoder.record().weights
        if weights != place.weights:
            raise ValueError(
                f"The head in {str(folder)!r} was fitted on a {place.model_class} with other weights "
                f"({place.weights}) than those of {encoder.name!r} ({weights}). Pass base=<that encoder>."
            )
        head = files.read_head(folder)
        if int(head.config["in_features"]) != encoder.dim:
            raise ValueError(
                f"The head in {str(folder)!r} takes {head.config['in_features']} numbers, {encoder.name!r} gives "
                f"{encoder.dim}. Save the probe again."
            )
        return cls(encoder, head, {**told, "protocol": None}, batch_size=batch_size)

    def to(self, device: str | torch.device) -> Self:
        """Move the encoder and the head."""
        self.encoder.to(device)
        self.head.to(device)
        return self


def _attributes(train: Labelled, test: Labelled) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None:
    """Those of both, if there are two at least."""
    pair = tuple(one.attributes if isinstance(one, AttributedImages) else {} for one in (train, test))
    return (pair[0], pair[1]) if all(pair) else None


__all__ = ["RepresentationProbe"]
