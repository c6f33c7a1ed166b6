"""`HyperfeaturesObjective`: the head of Diffusion Hyperfeatures, trained on key points by symmetric InfoNCE."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import check_keys, json_mapping, setting
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_images
from diffusers_repr.heads import HyperfeaturesHead
from diffusers_repr.heads.hyperfeature_maps import walk_maps
from diffusers_repr.hub.places import without_places
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact, State
from diffusers_repr.objectives.base import Batch, Objective
from diffusers_repr.objectives.frozen_base import FrozenBaseConfig
from diffusers_repr.pictures.figure import png_of

_OWN = ("width", "bottleneck")  # arguments of the head that a recipe gives in `head`


@dataclasses.dataclass(frozen=True)
class HyperfeaturesConfig(FrozenBaseConfig):
    """The frozen base, the steps that are read, and the head."""

    class_label: int | None = setting(None, "null class of a base whose config tells none")
    prompt: str | None = setting(None, "of a base with text; default: the empty prompt")
    layers: list[str] | None = setting(None, "full module paths; default: all residual branches on the way up")
    steps: int = setting(50, "network calls of the DDIM inversion; 1: one pass on the clean image")
    reads: list[int] | None = setting(None, "steps that are read, 0 is the clean image; default: the paper's 11 of 50")
    clean_timestep: float | None = setting(None, "told of the clean image; default: -1, as in the paper's code")
    head: dict | str | None = setting(None, "widths: arguments of HyperfeaturesHead, a mapping (JSON in a flag)")
    temperature: float = setting(0.07, "of the softmax over all places")
    eval_split: str | None = setting(None, "split of pairs to measure PCK on; none: no measurement")
    eval_pairs: int = setting(256, "pairs of it, the first")

    def __post_init__(self) -> None:
        super().__post_init__()
        take_back(self, "eval_split")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {self.temperature}.")
        allowed = [name for name in inspect.signature(HyperfeaturesHead.__init__).parameters if name in _OWN]
        arguments = json_mapping("head", self.head)
        check_keys("`head`", arguments, allowed)
        object.__setattr__(self, "head", arguments)


def map_cells(points: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The cell of a map in which each point of an image lies, row by row; beyond the edge that at the edge.

    Args:
        points: `(..., 2)` as (x, y) in pixels, the centre of the first pixel at (0, 0).
        size: (H, W) of the image.
        grid: (h, w) of the map.

    Returns:
        `(...)` int64, `row * w + column`.

    Example:
        >>> map_cells(torch.tensor([[0.0, 0.0], [3.0, 1.0], [99.0, 7.0]]), (8, 8), (4, 4)).tolist()
        [0, 1, 15]
    """
    columns, rows = (
        ((points[..., axis] + 0.5) * grid[1 - axis] / size[1 - axis]).floor().long().clamp(0, grid[1 - axis] - 1)
        for axis in (0, 1)
    )
    return rows * grid[1] + columns


def keypoint_infonce(first: Tensor, second: Tensor, cells: Tensor, valid: Tensor, temperature: float = 0.07) -> Tensor:
    """Symmetric InfoNCE of key points against all places of the other image (Hyperfeatures, sec. 3.3).

    `1 / temperature` times the cosines of each point with every place of the other map, and the cross-entropy with the
    place where it belongs, both ways. Rows of points alone are made, and not all places by all places.

    Args:
        first: Maps `(B, C, h, w)`.
        second: Maps of the other images of the pairs, of the same shape.
        cells: `(2, B, P)`, the place of each point in either map; see `map_cells`.
        valid: `(B, P)` bool, which points count.
        temperature: 0.07, which is not trained.

    Returns:
        The mean over valid points and both ways; 0 if none is valid.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if first.shape != second.shape or first.ndim != 4 or cells.shape != (2, len(first), valid.shape[-1]):
        raise ValueError(
            f"Two maps (B, C, h, w) alike and cells (2, B, P) are needed; got {tuple(first.shape)}, "
            f"{tuple(second.shape)} and {tuple(cells.shape)}."
        )
    wide = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        maps = [F.normalize(one.to(wide).flatten(2), dim=1) for one in (first, second)]
        losses = []
        for source, target in ((0, 1), (1, 0)):
            places = cells[source][:, None].expand(-1, maps[source].shape[1], -1)
            logits = maps[source].gather(2, places).transpose(1, 2) @ maps[target] / temperature  # (B, P, h w)
            losses.append(F.cross_entropy(logits.transpose(1, 2), cells[target], reduction="none"))
    mean = (losses[0] + losses[1]) / 2
    return (mean * valid).sum() / valid.sum().clamp(min=1)


@dataclasses.dataclass(frozen=True)
class WeightsPicture(FixedArtifact):
    """The mixing weights of a head by layer and level, as `mixing_weights.png`.

    Attributes:
        thing: The `ModelArtifact` of the head.
    """

    @property
    def kind(self) -> str:
        """What is drawn."""
        return "picture of the mixing weights"

    def save(self, root: Path, state: State, dtype: torch.dtype) -> None:
        """See `Artifact.save`; without matplotlib a warning takes the picture's place."""
        try:
            figure = self.thing.build(state).plot_weights()
        except ImportError as error:
            warnings.warn(f"mixing_weights.png is not drawn: {error}", stacklevel=2)
            return
        (root / "mixing_weights.png").write_bytes(png_of(figure))


class HyperfeaturesObjective(Objective):
    """The loss of a `HyperfeaturesHead`; the denoiser is frozen.

    A batch has `images` (2, B, C, H, W) in [-1, 1], first and second of each pair, `points` (2, B, P, 2) as (x, y) in
    their pixels, and `valid` (B, P).

    Args:
        denoiser: The base, from a pipeline.
        size: (H, W) of the images.
        config: The head, and what it reads.
    """

    def __init__(self, denoiser: Denoiser, size: tuple[int, int], config: HyperfeaturesConfig) -> None:
        super().__init__()
        require_images(denoiser, "Hyperfeatures")
        self.config, self.denoiser, self.size = config, denoiser, size
        self.freeze_base(denoiser)
        self.head = HyperfeaturesHead.for_base(
            denoiser, config.layers, size, steps=config.steps, reads=config.reads, prompt=config.prompt,
            clean_timestep=config.clean_timestep, **json_mapping("head", config.head),
        )  # fmt: skip
        self.card = self.about()

    def about(self) -> dict[str, Any]:
        """What the card tells."""
        head, base = self.head, str(self.config.pretrained_model_name_or_path)
        told = ", ".join(f"{time:g}" for time in head.config["timesteps"])
        text = f"It joins {len(head.config['layers'])} layers of `{without_places(base)}` at timesteps {told} of a "
        text += f"DDIM inversion of {head.config['steps']} steps to descriptors of {head.config['width']} channels "
        text += "(Diffusion Hyperfeatures, arXiv 2305.14334); `Hyperfeatures.from_pretrained` of "
        text += "`diffusers_repr.heads` loads it with its base, as a source of features.\n\n"
        text += "![The share of each layer at each level](mixing_weights.png)"
        return {"kind": "`HyperfeaturesHead`", "text": text, "tags": ["hyperfeatures", "correspondence"],
                "base_model": self.config.public_base}  # fmt: skip

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch of pairs."""
        first, second = self.head(self.maps(batch["images"].flatten(0, 1))).chunk(2)
        grid = (first.shape[2], first.shape[3])
        cells = map_cells(batch["points"], self.size, grid)
        return {"loss": keypoint_infonce(first, second, cells, batch["valid"], self.config.temperature)}

    def maps(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Layer -> maps (N, C_l, h_l, w_l) at each level, without gradient, of images (N, C, H, W) in [-1, 1].

        All are held, at their own resolution: the gradient of the convolutions that read them needs them.
        """
        found: dict[str, list[Tensor]] = {path: [] for path in self.head.config["layers"]}
        x0 = self.denoiser.encode_pixels(images)
        size, config = (images.shape[2], images.shape[3]), self.config
        condition = self.denoiser.condition(
            config.prompt, class_labels=config.class_label, batch=len(x0), size=size
        ).kwargs()

        def keep(place: int, path: str, value: Tensor) -> None:
            found[path].append(value)

        walk_maps(
            self.denoiser, x0, condition, list(found), config.steps, self.head.reads, keep, config.clean_timestep
        )
        return found

    # What is saved

    def artifacts(self) -> Sequence[Artifact]:
        """The head as the folder itself, and a picture of its weights."""
        head = ModelArtifact(self.head, "head")
        return [head, WeightsPicture(head)]


__all__ = ["HyperfeaturesConfig", "HyperfeaturesObjective", "keypoint_infonce", "map_cells"]
