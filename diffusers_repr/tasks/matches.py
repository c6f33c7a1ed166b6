"""What correspondence gives: points, their matches, how like they are; as numbers, a homography and a picture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusers_repr.denoiser.images import to_pixels
from diffusers_repr.pictures.match_lines import draw_match_lines, draw_similarity, stack_pictures
from diffusers_repr.tasks.homography import Homography, HomographyMethod, find_homography


@dataclass(frozen=True, eq=False, repr=False)
class Matches:
    """Points of one image and where they lie in another. All points are (x, y), the first pixel's centre at (0, 0).

    Attributes:
        points: `(N, 2)` float32, in pixels of the source image.
        matches: `(N, 2)` float32, in pixels of the target image.
        scores: `(N,)` float32: cosine of the two features; of mutual neighbours by `l2` minus the squared distance.
        source_size: (H, W) of the source image.
        target_size: (H, W) of the target image.
        cycle: `(N,)` pixels by which the way back from the match misses the point; None if not asked for.
        similarity: `(N, H, W)` cosine of each point with every pixel of the target; None if not asked for.
        source: The source image as it was passed.
        target: The target image.
    """

    points: Tensor
    matches: Tensor
    scores: Tensor
    source_size: tuple[int, int]
    target_size: tuple[int, int]
    cycle: Tensor | None = None
    similarity: Tensor | None = None
    source: Any = None
    target: Any = None

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        more = "".join(f", {name}" for name in ("cycle", "similarity") if getattr(self, name) is not None)
        return f"Matches({len(self)} points, {_size(self.source_size)} to {_size(self.target_size)}{more})"

    def keep(self, which: Tensor) -> Matches:
        """Some of the matches.

        Args:
            which: `(N,)` bool, or places.

        Example:
            >>> found = Matches(torch.zeros(2, 2), torch.ones(2, 2), torch.tensor([0.2, 0.9]), (4, 4), (4, 4))
            >>> len(found.keep(found.scores > 0.5))
            1
        """
        names = ("points", "matches", "scores", "cycle", "similarity")
        held = {name: getattr(self, name) for name in names}
        kept: dict[str, Any] = {name: None if value is None else value[which] for name, value in held.items()}
        return replace(self, **kept)

    def homography(self, method: HomographyMethod = "ransac", **settings: Any) -> Homography:
        """The homography that most of the matches agree with; see `find_homography`.

        Args:
            method: `ransac` or `lmeds`.
            **settings: `threshold`, `trials`, `seed`.
        """
        return find_homography(self.points, self.matches, method, **settings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; similarity maps and images are left out."""
        rows = []
        for at in range(len(self)):
            row = {
                "source": self.points[at].tolist(),
                "target": self.matches[at].tolist(),
                "score": float(self.scores[at]),
            }
            rows.append(row if self.cycle is None else {**row, "cycle": float(self.cycle[at])})
        sizes = {"source_size": list(self.source_size), "target_size": list(self.target_size)}
        return {"order": "x, y", **sizes, "matches": rows}

    def plot(
        self,
        source: Any = None,
        target: Any = None,
        *,
        limit: int = 100,
        maps: int = 8,
        correct: Tensor | None = None,
        height: int = 360,
        title: str | None = None,
    ) -> Image.Image:
        """A picture: both images with a line for each match; below, where asked for, the similarity maps.

        Args:
            source: Image to show; the one that was passed if None.
            target: Image to show.
            limit: Lines at most: of the matches with the highest scores.
            maps: Similarity maps at most, the first ones.
            correct: `(N,)` bool: lines are green where true, red where not.
            height: Of both images, in pixels.
            title: Above.

        Raises:
            ValueError: If there are no images, or no matches.
        """
        source, target = self.source if source is None else source, self.target if target is None else target
        if source is None or target is None:
            raise ValueError("These matches came without their images; pass plot(source, target).")
        if not len(self):
            raise ValueError("There are no matches to show.")
        left, right = as_pil(source), as_pil(target)
        best = self.scores.argsort(descending=True, stable=True)[:limit].sort().values
        shown = self.keep(best)
        picture = draw_match_lines(
            left,
            right,
            shown.points.cpu().numpy(),
            shown.matches.cpu().numpy(),
            correct=None if correct is None else [bool(value) for value in correct[best.cpu()]],
            height=height,
            title=title,
        )
        if shown.similarity is None:
            return picture
        heat = draw_similarity(right, shown.similarity[:maps].cpu().numpy(), shown.matches[:maps].cpu().numpy())
        return stack_pictures([picture, heat])


def as_pil(image: Any) -> Image.Image:
    """An image of any kind that `to_pixels` takes, in colours."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    image = image[0] if image.ndim == 4 else image
    channels = 1 if (image.ndim == 2 or image.shape[0 if isinstance(image, Tensor) else -1] == 1) else 3
    pixels = to_pixels(image, channels)[0]
    values = ((pixels + 1) * 127.5).round().to(torch.uint8).expand(3, -1, -1)
    return Image.fromarray(values.movedim(0, -1).contiguous().cpu().numpy())


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


__all__ = ["Matches", "as_pil"]
