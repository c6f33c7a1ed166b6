"""`ScribbleObjective`: a segmentation network of transformers, learned from scribbles: few pixels have a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from diffusers_repr.config.measured import take_back
from diffusers_repr.config.recipe import setting
from diffusers_repr.encoders.preprocessing import preprocess
from diffusers_repr.hub import load_json_config, resolve_folder
from diffusers_repr.hub.components import check_config, check_weight_files, refuse_adapter
from diffusers_repr.objectives.artifacts import Artifact, FixedArtifact, ModelArtifact
from diffusers_repr.objectives.base import Batch, Objective, weighted_sum
from diffusers_repr.objectives.new_or_trained import new_or_trained
from diffusers_repr.objectives.preprocessor import Preprocessor
from diffusers_repr.objectives.scribble.pairwise import at_scale, pairwise_energy
from diffusers_repr.objectives.scribble.partial import partial_cross_entropy

MODEL_TYPES = ("upernet", "segformer", "mobilenet_v2", "beit", "dpt", "mobilevit")
_HALF = (0.5, 0.5, 0.5)  # as mean and as standard deviation: a network then sees [-1, 1]


@dataclasses.dataclass(frozen=True)
class Segmenting:
    """A network that segments, and how it takes images of three channels.

    Attributes:
        network: Of transformers, whose output has `logits`.
        mean: Of pixels in [0, 1], which it takes standardised.
        std: As `mean`.
    """

    network: nn.Module
    mean: tuple[float, ...] = _HALF
    std: tuple[float, ...] = _HALF

    def logits(self, images: Tensor, network: nn.Module | None = None) -> Tensor:
        """`(B, K, H, W)` of images `(B, 3, H, W)` in [-1, 1], brought to their size.

        Args:
            images: The images.
            network: Another of the same kind, such as the average of its weights.
        """
        size = (images.shape[2], images.shape[3])
        found = (network or self.network)(pixel_values=preprocess(images, size, self.mean, self.std)).logits
        if found.shape[2:] == images.shape[2:]:
            return found
        return F.interpolate(found, size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def predict(self, images: Tensor, network: nn.Module | None = None) -> Tensor:
        """Class ids `(B, H, W)`; see `logits`."""
        return self.logits(images, network).argmax(1)


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """The network; the fields are keys of a recipe.

    Raises:
        ValueError: Without a network or with two, and for arguments that its config does not know.
    """

    segmenter: dict | str | None = setting(
        None, f"a new network: model_type ({', '.join(MODEL_TYPES)}) and arguments of its config, a mapping"
    )
    segmenter_name_or_path: str | None = setting(None, "a trained one to go on from: a folder or Hub id")

    def __post_init__(self) -> None:
        new_or_trained(self, "segmenter", "network", MODEL_TYPES)

    def build(self, class_names: Sequence[str]) -> Segmenting:
        """The network, for these classes; the last layer of one with other classes is drawn anew.

        Raises:
            OSError, ValueError: For what is no network of transformers that segments.
        """
        told: dict[str, Any] = {"id2label": dict(enumerate(class_names))}
        told["label2id"] = {name: number for number, name in told["id2label"].items()}
        if self.segmenter_name_or_path is not None:
            return _trained(self.segmenter_name_or_path, told)
        arguments = dict(cast(Mapping[str, Any], self.segmenter))
        config = AutoConfig.for_model(arguments.pop("model_type"), **{**arguments, **told})
        return Segmenting(AutoModelForSemanticSegmentation.from_config(config))


def _trained(name: str, told: Mapping[str, Any]) -> Segmenting:
    """A segmenter of a folder or Hub id, with the preprocessing that it was trained with."""
    config = check_config(load_json_config(name, "config.json"), f"config.json of {name!r}")
    if config.get("model_type") not in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        raise ValueError(
            f"{name!r} is a {config.get('model_type') or config.get('_class_name')!r}, no network of transformers "
            f"that segments; such are {', '.join(MODEL_TYPES)}."
        )
    seen = load_json_config(name, "preprocessor_config.json")
    planes = [tuple(map(float, seen.get(key, _HALF))) for key in ("image_mean", "image_std")]
    folder = resolve_folder(name, allow_patterns=("*.json", "*.safetensors"))
    check_weight_files(folder)
    refuse_adapter(folder)
    network, info = AutoModelForSemanticSegmentation.from_pretrained(
        folder, ignore_mismatched_sizes=True, use_safetensors=True, local_files_only=True, output_loading_info=True,
        **told,
    )  # fmt: skip
    # Only what gives a logit a class may be of other sizes; transformers draws anew whatever does not fit.
    classes = len(told["id2label"])
    changed = [(key, tuple(was), tuple(now)) for key, was, now in info["mismatched_keys"]]
    lost = sorted(key for key, was, now in changed if now[0] != classes or was[1:] != now[1:])
    lost += sorted(info["missing_keys"])
    if lost:
        raise ValueError(
            f"The weights in {name!r} are not those of its config: {', '.join(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''} would be drawn anew. Save or download it again."
        )
    return Segmenting(network, *planes)


@dataclasses.dataclass(frozen=True)
class ScribbleConfig:
    """The losses; the fields are keys of a recipe.

    Raises:
        ValueError: If a number is out of range.
    """

    pairwise_weight: float = setting(0.1, "of the pairwise regulariser; 0: none")
    sigma_colour: float = setting(15.0, "of the difference of colours of two pixels, in 256ths")
    sigma_place: float = setting(100.0, "of their distance, in pixels of the images")
    pairwise_radius: int | None = setting(None, "pairs no farther apart, in pixels of the smaller maps; default: all")
    pairwise_scale: float = setting(0.5, "share of the size at which pairs are compared")
    eval_split: str | None = setting(None, "split of real images whose mean IoU is measured; none: no measurement")
    eval_mask_column: str = setting("mask", "of that split: the class of every pixel")

    def __post_init__(self) -> None:
        if self.pairwise_weight < 0:
            raise ValueError(f"`pairwise_weight` is 0 or more, got {self.pairwise_weight}.")
        for name in ("sigma_colour", "sigma_place"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not 0 < self.pairwise_scale <= 1:
            raise ValueError(f"`pairwise_scale` lies in (0, 1], got {self.pairwise_scale}.")
        if self.pairwise_radius is not None and self.pairwise_radius < 1:
            raise ValueError(f"`pairwise_radius` must be at least 1, got {self.pairwise_radius}.")
        take_back(self, "eval_split")


class ScribbleObjective(Objective):
    """Partial cross-entropy of scribbles, and a pairwise regulariser of all pixels (arXiv 1803.09569, 2311.17121).

    A batch has `pixel_values` in [-1, 1] and `masks` (B, H, W) of the same size, most of them without a class. Logs
    `partial_cross_entropy` and `pairwise`. The result is the network's folder of transformers.

    Args:
        segmenter: The network, and how it takes images.
        class_names: Of the classes.
        config: The losses.
        ignore_index: Id of pixels without a class.

    Raises:
        ValueError: For fewer than two classes.
    """

    def __init__(
        self,
        segmenter: Segmenting,
        class_names: Sequence[str],
        config: ScribbleConfig | None = None,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"A segmenter needs two classes; got {list(class_names)}.")
        self.segmenter, self.network, self.class_names = segmenter, segmenter.network, list(class_names)
        self.config, self.ignore_index = config or ScribbleConfig(), ignore_index
        self.card = {
            "kind": f"`{type(self.network).__name__}`", "library_name": "transformers",
            "pipeline_tag": "image-segmentation", "tags": ["vision", "image-segmentation", "scribbles"],
            "text": "Classes: " + ", ".join(self.class_names) + ". It was trained on scribbles.",
        }  # fmt: skip

    def forward(self, batch: Batch, phase: str = "main") -> dict[str, Tensor]:
        """The loss of a batch, and its terms."""
        images, config = batch["pixel_values"], self.config
        logits = self.segmenter.logits(images)
        terms = {"partial_cross_entropy": partial_cross_entropy(logits, batch["masks"], self.ignore_index)}
        if config.pairwise_weight:
            maps = [at_scale(each, config.pairwise_scale) for each in (logits.float().softmax(1), images.float())]
            sigma = config.sigma_place * config.pairwise_scale
            terms["pairwise"] = pairwise_energy(
                *maps, sigma_colour=config.sigma_colour, sigma_place=sigma, radius=config.pairwise_radius
            )
        return weighted_sum(terms, {"pairwise": config.pairwise_weight})

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Masks of the images' size must be there.

        Raises:
            ValueError: Naming what is wrong.
        """
        masks = batch.get("masks")
        if masks is None:
            raise ValueError("Scribbles are masks of the pixels; name their column by --mask_column.")
        if masks.shape[1:] != batch["pixel_values"].shape[-2:]:
            raise ValueError(
                f"The scribbles are {tuple(masks.shape[1:])} (H, W), the images "
                f"{tuple(batch['pixel_values'].shape[-2:])}; resize masks by the nearest pixel."
            )
        last = len(self.class_names) - 1
        wrong = masks[((masks < 0) | (masks > last)) & (masks != self.ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"A scribble has the class {int(wrong[0])}; classes are 0 to {last}, and {self.ignore_index} where "
                "there is none."
            )

    def artifacts(self) -> list[Artifact]:
        """The network as a folder of transformers, with its preprocessing."""
        planes = {"image_mean": list(self.segmenter.mean), "image_std": list(self.segmenter.std)}
        return [
            ModelArtifact(self.network, "network"),
            FixedArtifact(Preprocessor(do_resize=False, **planes)),
        ]


__all__ = ["MODEL_TYPES", "ScribbleConfig", "ScribbleObjective", "SegmenterConfig", "Segmenting"]
