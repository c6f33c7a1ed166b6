"""What a probe must know besides its weights to give the same answer elsewhere; written to `probe.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features import FeatureExtractor
from diffusers_repr.features.posterior import SamplePosterior
from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.hub.schema import shown
from diffusers_repr.noise import NoiseLevel
from diffusers_repr.tasks.recipe_schema import BASE, recipe_schema

FORMAT = "diffusers_repr.probe/1"


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        name: `accuracy` or `balanced_accuracy`.
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
class ProbeRecipe:
    """Everything between an image and the head.

    Attributes:
        base: The model.
        layers: Full module paths; their features stand side by side in this order, within each level.
        levels: Noise levels, in the order of their features.
        label_names: Name of each class id.
        where: `output`, `input` or `residual`, as in `capture`.
        noise: Noise policy.
        seed: Of the noise and of fitting.
        ensemble_size: Noise draws an image.
        pooling: `mean`, `max` or `adaptive:P`.
        image_size: (H, W) in pixels to which every image is resized.
        preprocessing: How, in words.
        sample_posterior: How the VAE's latents are drawn; as in `FeatureExtractor`.
        prompt: Prompt of every image, unless another is given in the call.
        class_labels: Condition of a class-conditional model, for every image.
        protocol: How the head was fitted: every field, and what was chosen.
        train: Name, split and rows of the training data.
        scores: What was measured.
        versions: Of the libraries.
    """

    base: BaseRecord
    layers: tuple[str, ...]
    levels: tuple[Level, ...]
    label_names: tuple[str, ...]
    where: str
    noise: str
    seed: int
    ensemble_size: int
    pooling: str
    image_size: tuple[int, int]
    preprocessing: Mapping[str, Any]
    sample_posterior: SamplePosterior
    prompt: str | None
    class_labels: int | None
    protocol: Mapping[str, Any]
    train: Mapping[str, Any]
    scores: tuple[Score, ...]
    versions: Mapping[str, str]

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
            "pooling": self.pooling,
            "seed": self.seed,
            "where": self.where,
            "image_size": self.image_size,
            "sample_posterior": self.sample_posterior,
        }
        return FeatureExtractor(denoiser, **{**settings, **changes})

    def with_scores(self, scores: Sequence[Score]) -> ProbeRecipe:
        """A copy in which these scores replace those of the same name, data set and split."""
        new = {(s.name, s.dataset, s.split): s for s in scores}
        kept = [s for s in self.scores if (s.name, s.dataset, s.split) not in new]
        return replace(self, scores=(*kept, *scores))

    def with_base(self, name: str, revision: str | None = None) -> ProbeRecipe:
        """A copy whose base is the Hub id `name`."""
        return replace(self, base=replace(self.base, name=name, local=False, revision=revision, commit=None))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; infinity as the text `inf`."""
        plain = asdict(self)
        plain["base"] = {name: plain["base"][name] for name in BASE}
        return {"format": FORMAT, **_finite(plain)}

    @classmethod
    def from_dict(cls, data: Any, source: str = "probe.json") -> ProbeRecipe:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If it is no recipe of this format; names `source` and the field.
        """
        if not isinstance(data, dict) or not str(data.get("format", "")).startswith("diffusers_repr.probe/"):
            raise ValueError(f"{source} is no probe's recipe: its format must be {FORMAT!r}.")
        if data["format"] != FORMAT:
            raise ValueError(
                f"{source} has the format {shown(data['format'])}; this version reads {FORMAT!r}. Upgrade."
            )
        try:
            fields = _SCHEMA({k: v for k, v in data.items() if k != "format"}, "probe.json")
        except ValueError as error:
            raise ValueError(f"{source} is damaged or was edited ({error}). Take it from its source again.") from error
        fields["base"] = BaseRecord(**fields["base"])
        fields["levels"] = tuple(Level(**level) for level in fields["levels"])
        fields["scores"] = tuple(Score(**score) for score in fields["scores"])
        fields |= {name: tuple(fields[name]) for name in ("layers", "label_names", "image_size")}
        return cls(**fields)


_SCHEMA = recipe_schema(Score)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
