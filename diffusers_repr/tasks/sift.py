"""`SiftCorrespondence`: points found again by SIFT, the baseline of correspondence that needs no network."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from diffusers_repr.data.image_pairs import ImagePairs
from diffusers_repr.data.known_pairs import sift, sift_matches
from diffusers_repr.hub.files import atomic_files, read_json
from diffusers_repr.hub.schema import mapping, number, one_of, record
from diffusers_repr.metrics.pck import PCKReference, correct_points, pck, reference_length
from diffusers_repr.tasks.task import Task

FILE, FORMAT = "sift.json", "diffusers_repr.sift/1"
_SCHEMA = record({"format": one_of(FORMAT), "scores": mapping(number(), 0, 1000)})


class SiftCorrespondence(Task):
    """Each point gets the key point of the other image whose descriptor is nearest, over all orientations.

    The points that are asked about must be SIFT's own key points of their image, as those of the data set
    `photographs`; scikit-image's settings are its defaults.
    """

    def __init__(self) -> None:
        self.head, self.denoiser, self.recipe = None, None, {}  # type: ignore[assignment]

    @classmethod
    def fit(cls, source: Any = None, train: Any = None, validation: Any = None, **settings: Any) -> Self:
        """Nothing is learned, and nothing of what is passed is read."""
        return cls()

    def __call__(self, source: Any, target: Any) -> Tensor:
        """Key points `(N, 2)` of the source as (x, y) beside their matches: `(N, 4)`.

        Args:
            source: PIL image.
            target: PIL image.
        """
        key = torch.from_numpy(sift(source).keypoints[:, ::-1].astype(float)).unique(dim=0)
        pairs = ImagePairs.from_list([(source, target, key, torch.zeros_like(key))])
        return torch.cat([key, sift_matches(pairs, pairs.pairs[0], {})], dim=1)

    def evaluate(
        self, data: Any, *, record: bool = True, alpha: float = 0.1, reference: PCKReference = "box"
    ) -> dict[str, float]:
        """PCK of annotated pairs, as `Correspondence.evaluate` measures it.

        Args:
            data: `ImagePairs`, or a list of `(source, target, source_points, target_points)`.
            record: Keep the scores.
            alpha: Share of the reference length that a match may be off.
            reference: `box` of the object in the target image, or the `image`.

        Raises:
            ValueError: For points that are no key points of SIFT.
            ImportError: If scikit-image is missing.
        """
        pairs = data if isinstance(data, ImagePairs) else ImagePairs.from_list(data)
        found: dict[int, Any] = {}
        correct: dict[str | None, list[Tensor]] = {None: []}
        for at, pair in enumerate(pairs.pairs):
            length = reference_length(reference, pairs.size(pair.target), pair.box)
            try:
                answers = sift_matches(pairs, pair, found)
            except (IndexError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"{pairs}: pair {at} asks about points that are no key points of SIFT, which has answers for its "
                    "own alone."
                ) from error
            right = correct_points(answers, pair.target_points, length, alpha)
            for name in dict.fromkeys((None, pair.category)):
                correct.setdefault(name, []).append(right)
        whole = pck(correct.pop(None), alpha)
        result = {"pck": whole.per_point, "pck_per_image": whole.per_image}
        if record:
            self.recipe |= {f"{name} at {alpha:g} of the {reference}": value for name, value in result.items()}
        each = {f"pck: {name}": pck(own, alpha).per_point for name, own in correct.items()}
        return {**result, "points": whole.points, "rows": whole.pairs, **each}

    def card(self, title: str) -> str:
        """What it is, and what was measured.

        Args:
            title: Heading.
        """
        rows = [f"| {name} | {value:.4f} |" for name, value in self.recipe.items()]
        scores = "\n".join(["| measure | value |", "|---|---|", *rows]) if rows else "Not measured."
        head = "---\nlibrary_name: diffusers-repr\ntags: [correspondence]\n---\n"
        return f"{head}\n# {title}\n\nPoints found again by SIFT of scikit-image; there is no network.\n\n{scores}\n"

    def save_pretrained(self, folder: str | os.PathLike[str], *, title: str | None = None) -> None:
        """Write the scores and a card, both or none.

        Args:
            folder: A new or empty folder, or one of the same kind.
            title: Heading of the card; the folder's name if None.

        Raises:
            FileExistsError: If it holds something else.
        """
        place = Path(folder)
        if place.is_dir() and any(place.iterdir()) and not (place / FILE).is_file():
            raise FileExistsError(f"{str(folder)!r} is not empty and holds no {FILE}. Choose another folder.")
        told = {"format": FORMAT, "scores": self.recipe}
        card = self.card(title or Path(os.path.abspath(place)).name)
        atomic_files(place, {FILE: json.dumps(told, indent=2) + "\n", "README.md": card})

    @classmethod
    def from_pretrained(cls, id_or_folder: str | os.PathLike[str], base: Any = None, **kwargs: Any) -> Self:
        """Read what `save_pretrained` wrote.

        Args:
            id_or_folder: A folder.
            base: There is none; it is not looked at.
            **kwargs: Likewise.
        """
        made = cls()
        made.recipe = dict(_SCHEMA(read_json(Path(id_or_folder) / FILE), FILE)["scores"])
        return made

    def to(self, device: str | torch.device) -> Self:
        """There is nothing to move."""
        return self


__all__ = ["SiftCorrespondence"]
