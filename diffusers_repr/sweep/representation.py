"""`measure_representation`: the one evaluation of any representation, always beside what tells whether it is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.data.labelled import ImageRows, Labelled, open_labelled
from diffusers_repr.encoders import Encoder
from diffusers_repr.metrics.auroc import total_auroc_difference
from diffusers_repr.metrics.encoding import Which, check_which, encode_images
from diffusers_repr.sweep.disentanglement import Predictor, dci_score
from diffusers_repr.sweep.finetune_probe import FinetuneProtocol, finetune_probe
from diffusers_repr.sweep.probes import few_shot_probe, knn_probe, linear_probe

PROBES = ("linear", "few_shot", "knn", "finetune")
PIXELS, RANDOM = "raw pixels", "random network"
BASELINES = {"pixels": PIXELS, "random": RANDOM}
Attributes = Mapping[str, Tensor]


@dataclass(frozen=True)
class ProbeSettings:
    """How representations are probed; one of them for all that are compared.

    Attributes:
        probes: Of `linear`, `few_shot`, `knn`, `finetune`.
        shots: Labels a class of `few_shot`.
        draws: How often they are drawn.
        k: Neighbours of `knn`.
        protocol: Of the linear probes, see `PROTOCOLS`.
        finetune: Of `finetune`.
        features: `global`, or the mean of the `tokens`.
        predictor: Of DCI.
        seed: Of draws, orders and forests.

    Raises:
        ValueError: For an unknown probe, or the same one twice.
    """

    probes: tuple[str, ...] = ("linear", "few_shot", "knn")
    shots: int = 5
    draws: int = 5
    k: int = 20
    protocol: str | None = None
    finetune: FinetuneProtocol = field(default_factory=FinetuneProtocol)
    features: Which = "global"
    predictor: Predictor = "forest"
    seed: int = 0

    def __post_init__(self) -> None:
        check_which(self.features)
        unknown = [name for name in self.probes if name not in PROBES]
        if unknown or len(set(self.probes)) < len(self.probes):
            what = f"unknown probe {unknown[0]!r}" if unknown else f"a probe is named twice in {list(self.probes)}"
            raise ValueError(f"probes: {what}; expected some of {', '.join(PROBES)}, each once.")


@dataclass(frozen=True)
class RepresentationScores:
    """What `measure_representation` found.

    Attributes:
        rows: Name -> its scores: `linear`, `few_shot` and `few_shot_std`, `knn`, `finetune`, and of attributes
            `disentanglement`, `completeness`, `informativeness`, `tad`, `captured`. The first is the representation,
            the others stand beside it.
        dims: Name -> numbers of its vector.
        settings: How.
    """

    rows: Mapping[str, Mapping[str, float]]
    dims: Mapping[str, int]
    settings: ProbeSettings

    def flat(self) -> dict[str, float]:
        """The representation's own scores by name, then those of the others as `score: name`."""
        found: dict[str, float] = {}
        for at, (name, scores) in enumerate(self.rows.items()):
            found |= {(score if at == 0 else f"{score}: {name}"): value for score, value in scores.items()}
        return found


@dataclass(frozen=True)
class _Sets:
    """The data, opened once."""

    train: Labelled
    test: Labelled
    validation: Labelled | None
    attributes: tuple[Attributes, Attributes] | None
    image_size: int | tuple[int, int] | None
    batch_size: int

    def vectors(self, make: Callable[[ImageRows], Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        return make(self.train), make(self.test), None if self.validation is None else make(self.validation)


def measure_representation(
    encoder: Encoder,
    train: Any,
    test: Any,
    validation: Any = None,
    *,
    beside: Sequence[str | Encoder] = ("pixels", "random"),
    settings: ProbeSettings | None = None,
    attributes: tuple[Attributes, Attributes] | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    tell: Callable[[str], None] = lambda text: None,
) -> RepresentationScores:
    """Probes of a representation, and of what it has to be compared with, by one protocol on the same images.

    Args:
        encoder: Of `load_encoder`, or made.
        train: Labelled images that probes learn from; see `open_labelled`.
        test: Those that they are measured on.
        validation: On which penalties are tuned; None: a part of `train` each.
        beside: `pixels`: the images themselves; `random`: `encoder.untrained(seed)`; or other encoders, such as the
            selected layer of a plain diffusion model. An empty list leaves the number without a comparison.
        settings: How.
        attributes: Of the rows of `train` and of `test`, name -> `(N,)`: adds DCI and TAD. Whole numbers are classes;
            for TAD each class is an attribute, and numbers are one where they lie above the median of `train`.
        image_size: Resize all images first.
        batch_size: Images a forward.
        tell: Is told what is done.

    Raises:
        ValueError: For what does not fit, and for an unknown baseline.
        TypeError: For a network that cannot be made anew, with `random`.
    """
    settings = settings or ProbeSettings()
    sets = _Sets(
        open_labelled(train, "train"), open_labelled(test, "test"),
        None if validation is None else open_labelled(validation, "validation"), attributes, image_size, batch_size,
    )  # fmt: skip
    compared: dict[str, Encoder | None] = {encoder.name: encoder}
    for one in beside:
        if isinstance(one, str) and one not in BASELINES:
            known = ", ".join(BASELINES)
            raise ValueError(f"Unknown baseline {one!r}; expected {known}, or an encoder (`load_encoder` opens one).")
        name = BASELINES[one] if isinstance(one, str) else one.name
        if name in compared:
            raise ValueError(f"beside: {name!r} is named twice; give one of them another name.")
        compared[name] = (
            one if isinstance(one, Encoder) else encoder.untrained(settings.seed) if one == "random" else None
        )
    rows, dims = {}, {}
    for name, found in compared.items():
        tell(f"{name}: probes")
        rows[name], dims[name] = _scores(found, sets, settings)
    return RepresentationScores(rows, dims, settings)


def pixel_vectors(images: ImageRows, image_size: int | tuple[int, int] | None = None) -> Tensor:
    """The images themselves as vectors `(N, C H W)`, grey ones of one channel.

    Args:
        images: Of one size.
        image_size: Resize to (H, W) or a square.
    """
    first = images.read([0])[0]
    channels = 1 if getattr(first, "mode", "RGB") in ("L", "1", "I;16") else 3
    if isinstance(first, Tensor):
        channels = len(first) if first.ndim == 3 else 1
    return torch.cat([pixels.flatten(1) for _, pixels in images.pixels(256, channels, image_size)])


def _scores(encoder: Encoder | None, sets: _Sets, settings: ProbeSettings) -> tuple[dict[str, float], int]:
    """Of one representation; of raw pixels without an encoder, which nothing can be tuned of."""

    def make(images: ImageRows) -> Tensor:
        if encoder is None:
            return pixel_vectors(images, sets.image_size)
        size: dict[str, Any] = {"batch_size": sets.batch_size, "image_size": sets.image_size}
        return encode_images(encoder, images, settings.features, **size).features

    bank, queries, held = sets.vectors(make)
    labels, truth = sets.train.class_ids(), sets.test.class_ids()
    pair, found = (bank, labels, queries, truth), {}
    protocol, seed = settings.protocol, settings.seed
    if "linear" in settings.probes:
        tuned = None if held is None or sets.validation is None else (held, sets.validation.class_ids())
        found["linear"] = linear_probe(*pair, protocol=protocol, validation=tuned, seed=seed).accuracy
    if "few_shot" in settings.probes:
        few = few_shot_probe(*pair, settings.shots, draws=settings.draws, protocol=protocol, seed=seed)
        found |= {"few_shot": few.mean, "few_shot_std": few.std}
    if "knn" in settings.probes:
        found["knn"] = knn_probe(*pair, k=settings.k).accuracy
    if "finetune" in settings.probes and encoder is not None:
        how: dict[str, Any] = {"features": settings.features, "protocol": settings.finetune, "seed": seed}
        score = finetune_probe(encoder, sets.train, sets.test, image_size=sets.image_size, **how)
        found["finetune"] = score.accuracy
    if sets.attributes is not None:
        found |= attribute_scores(bank, queries, *sets.attributes, settings.predictor, seed)
    return found, bank.shape[1]


def attribute_scores(
    codes: Tensor, test_codes: Tensor, attributes: Attributes, test: Attributes, predictor: Predictor, seed: int = 0
) -> dict[str, float]:
    """DCI of predictors fitted to training rows and measured on test rows, and TAD of test rows.

    Args:
        codes: `(N, D)`.
        test_codes: `(M, D)`.
        attributes: As in `measure_representation`.
        test: Of the test rows.
        predictor: See `dci_score`.
        seed: Likewise.
    """
    dci = dci_score(codes, attributes, test_codes, test, predictor=predictor, seed=seed)
    tad = total_auroc_difference(test_codes, binary_attributes(attributes, test))
    return {
        "disentanglement": dci.disentanglement,
        "completeness": dci.completeness,
        "informativeness": dci.informativeness,
        "tad": tad.value,
        "captured": float(len(tad.captured)),
    }


def binary_attributes(attributes: Attributes, test: Attributes) -> dict[str, Tensor]:
    """Attributes of test rows as 0 and 1: of more than two classes one a class, numbers above the training median.

    Args:
        attributes: Of training rows.
        test: Of the rows that are told of.

    Example:
        >>> found = binary_attributes({"size": torch.tensor([1.0, 2.0, 3.0])}, {"size": torch.tensor([0.5, 9.0])})
        >>> {name: values.tolist() for name, values in found.items()}
        {'size': [0, 1]}
    """
    found: dict[str, Tensor] = {}
    for name, values in test.items():
        known = torch.as_tensor(attributes[name])
        values = torch.as_tensor(values)
        if known.is_floating_point():
            found[name] = (values > known.median()).long()
            continue
        kinds = known.unique().tolist()
        if len(kinds) == 2:
            found[name] = (values == kinds[1]).long()
        else:
            found |= {f"{name} {kind}": (values == kind).long() for kind in kinds}
    return found


__all__ = [
    "BASELINES",
    "PROBES",
    "ProbeSettings",
    "RepresentationScores",
    "attribute_scores",
    "binary_attributes",
    "measure_representation",
    "pixel_vectors",
]
