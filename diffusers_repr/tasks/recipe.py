"""What a task must know besides its weights to give the same answer elsewhere: `probe.json` and the like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor, FeatureOutput
from diffusers_repr.features.pooling import leaves_maps
from diffusers_repr.features.posterior import SamplePosterior
from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.hub.schema import Check, shown
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.tasks.recipe_schema import BASE, FITTED, MATCHER, POOLING, SEGMENTATION, recipe_schema


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        name: Such as `accuracy` or `mean_iou`.
        value: In 0..1.
        dataset: Its name.
        split: Its split.
        rows: Number of images.
    """

    name: str
    value: float
    dataset: str
    split: str
    rows: int


@dataclass(frozen=True)
class FeatureRecipe:
    """Everything between an image and the features that a task reads.

    A task's own recipe subclasses it, or `TaskRecipe`, adds fields with their checks and names its file and format.

    Attributes:
        base: The model.
        layers: Full module paths; their features stand side by side in this order, within each level.
        levels: Noise levels, in the order of their features.
        where: `output`, `input` or `residual`, as in `capture`.
        noise: Noise policy.
        seed: Of the noise and of fitting.
        ensemble_size: Noise draws an image.
        image_size: (H, W) in pixels to which every image is resized; `"keep"`: it is not, where the task allows it.
        preprocessing: How, in words.
        sample_posterior: How the VAE's latents are drawn; as in `FeatureExtractor`.
        prompt: Prompt of every image, unless another is given in the call.
        class_labels: Condition of a class-conditional model, for every image.
        scores: What was measured.
        versions: Of the libraries.
        source: Class of the `FeatureSource` that is not a `FeatureExtractor`: levels, noise and layers are its own.
            The task's folder holds it (`Hyperfeatures`), or it must be given again when the task is loaded. None: a
            `FeatureExtractor` with these settings.
    """

    NOUN: ClassVar[str] = "task"  # what it is called in messages
    FILE: ClassVar[str] = "task.json"
    FORMAT: ClassVar[str] = "diffusers_repr.task/1"
    OWN: ClassVar[Mapping[str, Check]] = {}  # the checks of a subclass's fields
    MODELS: ClassVar[Mapping[str, Mapping[str, Check]]] = {"base": BASE}  # its records of models, and what is kept

    base: BaseRecord
    layers: tuple[str, ...]
    levels: tuple[Level, ...]
    where: str
    noise: str
    seed: int
    ensemble_size: int
    image_size: tuple[int, int] | Literal["keep"]
    preprocessing: Mapping[str, Any]
    sample_posterior: SamplePosterior
    prompt: str | None
    class_labels: int | None
    scores: tuple[Score, ...]
    versions: Mapping[str, str]
    source: str | None = field(default=None, kw_only=True)

    @property
    def pooled(self) -> str | None:
        """How features are pooled; None where the head takes maps."""
        return None

    @property
    def foreign(self) -> str | None:
        """Class of the source of features, where that is no `FeatureExtractor` and the recipe does not hold it."""
        return self.source

    def sizes(self, output: FeatureOutput) -> dict[str, int]:
        """Layer -> values of its feature: of a vector, or of each place of a map."""
        if leaves_maps(self.pooled):
            return {layer: output.as_map(layer).shape[-3] for layer in output.features}
        return {layer: feature.shape[-1] for layer, feature in output.features.items()}

    def extractor(self, denoiser: Denoiser, **changes: Any) -> FeatureExtractor:
        """The `FeatureExtractor` that gives a denoiser's features as the head expects them.

        Args:
            denoiser: The base.
            **changes: Other settings (`batch_size`, `output_device`, ...).
        """
        requests: list[dict[str, Any]] = [dict(level.requested) for level in self.levels]
        wanted = [NoiseLevel(**request) for request in requests]
        settings: dict[str, Any] = {
            "layers": list(self.layers),
            "timestep": wanted if len(wanted) > 1 else wanted[0],
            "noise": self.noise,
            "ensemble_size": self.ensemble_size,
            "pooling": self.pooled,
            "seed": self.seed,
            "where": self.where,
            "image_size": self.image_size,
            "sample_posterior": self.sample_posterior,
        }
        return FeatureExtractor(denoiser, **{**settings, **changes})

    def with_scores(self, scores: Sequence[Score]) -> Self:
        """A copy in which these scores replace those of the same name, data set and split."""
        new = {(s.name, s.dataset, s.split): s for s in scores}
        kept = [s for s in self.scores if (s.name, s.dataset, s.split) not in new]
        return replace(self, scores=(*kept, *scores))

    def with_base(self, name: str, revision: str | None = None) -> Self:
        """A copy whose base is the Hub id `name`."""
        return replace(self, base=replace(self.base, name=name, local=False, revision=revision, commit=None))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; infinity as the text `inf`."""
        plain = asdict(self)
        for model, kept in self.MODELS.items():
            plain[model] = {name: plain[model][name] for name in kept}
        if self.source is None:  # as files of earlier versions
            del plain["source"]
        return {"format": self.FORMAT, **_finite(plain)}

    @classmethod
    def from_dict(cls, data: Any, source: str | None = None) -> Self:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If it is no recipe of this format; names `source` and the field.
        """
        source = source or cls.FILE
        family = cls.FORMAT.partition("/")[0]
        if not isinstance(data, dict) or not str(data.get("format", "")).startswith(f"{family}/"):
            raise ValueError(f"{source} is no {cls.NOUN}'s recipe: its format must be {cls.FORMAT!r}.")
        if data["format"] != cls.FORMAT:
            raise ValueError(
                f"{source} has the format {shown(data['format'])}; this version reads {cls.FORMAT!r}. Upgrade."
            )
        try:
            found = cls._check()({k: v for k, v in data.items() if k != "format"}, cls.FILE)
        except ValueError as error:
            raise ValueError(f"{source} is damaged or was edited ({error}). Take it from its source again.") from error
        found |= {model: BaseRecord(**found[model]) for model in cls.MODELS}
        found["levels"] = tuple(Level(**level) for level in found["levels"])
        found["scores"] = tuple(Score(**score) for score in found["scores"])
        whole: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return cls(**whole)

    @classmethod
    def _check(cls) -> Check:
        """Of the fields of a file; those with a default may be missing."""
        own = {name: check for kind in reversed(cls.__mro__) for name, check in vars(kind).get("OWN", {}).items()}
        later = [one.name for one in fields(cls) if one.default is not MISSING and one.name in own]
        return recipe_schema(Score, own, later)


@dataclass(frozen=True)
class TaskRecipe(FeatureRecipe):
    """Everything between an image and the head of a task that is fitted to examples.

    Attributes:
        label_names: Name of each class id.
        protocol: How the head was fitted: every field, and what was chosen.
        train: Name, split and rows of the training data.
    """

    OWN: ClassVar[Mapping[str, Check]] = FITTED

    image_size: tuple[int, int]
    label_names: tuple[str, ...]
    protocol: Mapping[str, Any]
    train: Mapping[str, Any]


@dataclass(frozen=True)
class ProbeRecipe(TaskRecipe):
    """Everything between an image and the head of a probe.

    Attributes:
        pooling: `mean`, `max` or `adaptive:P` for a head on one vector an image, `map:P` for one on maps.
    """

    NOUN: ClassVar[str] = "probe"
    FILE: ClassVar[str] = "probe.json"
    FORMAT: ClassVar[str] = "diffusers_repr.probe/1"
    OWN: ClassVar[Mapping[str, Check]] = POOLING

    pooling: str

    @property
    def pooled(self) -> str | None:
        """As `pooling`."""
        return self.pooling


@dataclass(frozen=True)
class SegmentationRecipe(TaskRecipe):
    """Everything between an image and the head of a segmenter, whose features are maps.

    Attributes:
        ignore_index: Id of pixels of no class in the masks it was fitted on; None: there were none.
    """

    NOUN: ClassVar[str] = "segmenter"
    FILE: ClassVar[str] = "segmentation.json"
    FORMAT: ClassVar[str] = "diffusers_repr.segmentation/1"
    OWN: ClassVar[Mapping[str, Check]] = SEGMENTATION

    ignore_index: int | None


@dataclass(frozen=True)
class MatcherRecipe(FeatureRecipe):
    """Everything between an image and the features that correspondence compares, those of one layer.

    Attributes:
        chosen_on: Pairs on which layer and level were chosen: `dataset` and `pairs`; None: nobody did.
    """

    NOUN: ClassVar[str] = "matcher"
    FILE: ClassVar[str] = "correspondence.json"
    FORMAT: ClassVar[str] = "diffusers_repr.correspondence/1"
    OWN: ClassVar[Mapping[str, Check]] = MATCHER

    chosen_on: Mapping[str, Any] | None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


__all__ = ["FeatureRecipe", "MatcherRecipe", "ProbeRecipe", "Score", "SegmentationRecipe", "TaskRecipe"]
