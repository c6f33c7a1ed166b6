"""How a head is fitted, as named and versioned data that is saved with every score.

A number measured under a protocol can be compared only with numbers measured under the same one, so a protocol never
changes: other values need another version. A protocol with fields of your own keeps its name and shows what differs
(`describe()["changed"]`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from diffusers_repr.heads.base import Head, head_class, list_heads
from diffusers_repr.heads.map_classifier import MapClassifier
from diffusers_repr.heads.pooled.base import PooledHead

Norm = Literal["plain", "affine"]


@dataclass(frozen=True)
class Protocol:
    """Base of protocols.

    Attributes:
        name: Unique name.
        version: Raised whenever a field changes its value.
        standardize: Features are standardised by mean and std of the training set.
        source: Where it comes from, and what of it is not the source's.
    """

    name: str
    version: int = 1
    standardize: bool = True
    source: str = ""

    heads: ClassVar[tuple[str, ...]] = ()

    def fits(self, head: type[Head]) -> bool:
        """Whether a class of heads can be fitted so."""
        return head.kind in self.heads

    def replace(self, **changes: Any) -> Self:
        """A copy with other values; `describe` then lists them."""
        return dataclasses.replace(self, **changes)

    def describe(self) -> dict[str, Any]:
        """Every field as plain values for JSON; `changed` lists those that differ from the protocol of this name."""
        fields = dataclasses.asdict(self)
        original = PROTOCOLS.get(self.name)
        if type(original) is not type(self):
            return {**fields, "changed": []}
        return {**fields, "changed": [k for k, v in fields.items() if v != getattr(original, k)]}


@dataclass(frozen=True)
class RidgeProtocol(Protocol):
    """Least squares on one-hot targets with a penalty on the weights, in closed form (float64).

    Attributes:
        l2: Penalties tried; the best on the validation set is taken.
        default_l2: The penalty where there is nothing to validate on.
    """

    l2: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    default_l2: float = 1e-2

    heads: ClassVar[tuple[str, ...]] = ("linear",)

    def __post_init__(self) -> None:
        """Refuse what the closed form does not do."""
        if not self.standardize:
            raise ValueError("The closed form standardises features always; leave standardize=True.")


@dataclass(frozen=True)
class LBFGSProtocol(Protocol):
    """Multinomial logistic regression, `mean cross-entropy + l2 / 2 ||W||^2`, by scikit-learn's L-BFGS (float64).

    In scikit-learn's terms `C = 1 / (N l2)`. Version 1 stopped at a gradient of 1e-5, short of the optimum of weak
    penalties.

    Attributes:
        l2: Penalties tried; the best on the validation set is taken.
        default_l2: The penalty where there is nothing to validate on.
        max_iter: Iterations a penalty.
        tolerance: Largest absolute gradient at which it stops.
    """

    l2: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    default_l2: float = 1e-2
    max_iter: int = 10_000
    tolerance: float = 1e-10

    heads: ClassVar[tuple[str, ...]] = ("linear",)


@dataclass(frozen=True)
class MinibatchProtocol(Protocol):
    """Cross-entropy by stochastic gradient steps; the last step's weights are kept.

    Attributes:
        optimizer: `adam`, `sgd` or `lars`.
        learning_rate: Highest rate; with `rate_per_256` for a batch of 256, and proportional to the batch.
        rate_per_256: Whether the rate follows the batch.
        weight_decay: L2 penalty in the gradient.
        momentum: Of `sgd` and `lars`.
        trust_coefficient: Of `lars`; biases take no trust ratio and no weight decay.
        batch_size: Rows of one step; all of them if there are fewer.
        drop_last: Leave out an epoch's last batch if it is smaller.
        epochs: Passes over the features.
        warmup_epochs: Epochs in which the rate rises linearly from 0, step by step.
        schedule: `cosine_epoch`: cosine to 0, changed once an epoch; `cosine_step`: at every step; `step_epoch`: times
            `step_factor` after every `step_epochs` epochs; `constant`.
        step_epochs: Of `step_epoch`.
        step_factor: Of `step_epoch`.
        batch_norm: BatchNorm before the head: `plain` without, `affine` with weights of its own; None: none. In the
            fitted head its running statistics are `mean` and `std`.
        norm_eps: Epsilon of it.
        norm_momentum: Momentum of its running statistics.
        init_std: The head's last weights start from a normal of this std cut at 2 in value, biases at 0; None:
            torch's own.
    """

    optimizer: Literal["adam", "sgd", "lars"] = "adam"
    learning_rate: float = 1e-3
    rate_per_256: bool = False
    weight_decay: float = 0.0
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    batch_size: int = 128
    drop_last: bool = False
    epochs: int = 15
    warmup_epochs: int = 0
    schedule: Literal["cosine_epoch", "cosine_step", "step_epoch", "constant"] = "cosine_epoch"
    step_epochs: int = 7
    step_factor: float = 0.1
    batch_norm: Norm | None = None
    norm_eps: float = 1e-5
    norm_momentum: float = 0.1
    init_std: float | None = None

    def fits(self, head: type[Head]) -> bool:
        """Heads that gradient steps fit; those on maps bring their own norms."""
        if issubclass(head, MapClassifier):
            return head.takes_steps and not self.standardize and self.batch_norm is None and self.init_std is None
        return issubclass(head, PooledHead) and head.takes_steps

    def __post_init__(self) -> None:
        """Refuse values that could not act."""
        choices = {
            "optimizer": ("adam", "sgd", "lars"),
            "schedule": ("cosine_epoch", "cosine_step", "step_epoch", "constant"),
            "batch_norm": (None, "plain", "affine"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; allowed are {', '.join(map(repr, allowed))}.")
        for name in ("batch_size", "epochs", "step_epochs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1; got {value!r}.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0; got {self.learning_rate!r}.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"warmup_epochs={self.warmup_epochs} must be from 0 to below epochs={self.epochs}.")
        if self.standardize and self.batch_norm is not None:
            raise ValueError("standardize and batch_norm normalise twice; set standardize=False.")


@dataclass(frozen=True)
class KNNProtocol(Protocol):
    """All training features become the bank of a `KNNHead`.

    Attributes:
        k: Neighbours that vote; all of them if there are fewer.
        temperature: Of the vote.
        metric: `cosine` or `euclidean`.
    """

    k: int = 20
    temperature: float | None = 0.07
    metric: Literal["cosine", "euclidean"] = "cosine"

    heads: ClassVar[tuple[str, ...]] = ("knn",)


_MAE_SCHEDULE: dict[str, Any] = {
    "standardize": False,
    "optimizer": "lars",
    "learning_rate": 0.1,
    "rate_per_256": True,
    "batch_size": 16384,
    "drop_last": True,
    "epochs": 90,
    "warmup_epochs": 10,
    "schedule": "cosine_step",
}
_DIFFSSL: dict[str, Any] = {
    "standardize": False,
    "optimizer": "sgd",
    "momentum": 0.0,
    "epochs": 28,
    "schedule": "step_epoch",
}
_DIFFSSL_SOURCE = (
    "scripts/{} and finetune.py of soumik-kanad/diffssl: SGD without momentum, a tenth of the rate after every 7 "
    "epochs; the batch is that of its 4 GPUs. The source draws new noise, crops and flips for every image of every "
    "epoch."
)

PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        LBFGSProtocol("lbfgs", version=2, source="This library's default for linear heads."),
        RidgeProtocol("ridge", source="This library's fastest for linear heads."),
        KNNProtocol(
            "knn",
            source="Wu et al. 2018, arXiv 1805.01978: weighted vote with T = 0.07. k = 20 and the standardisation "
            "before the cosine are this library's.",
        ),
        MinibatchProtocol(
            "adam", learning_rate=3e-3, batch_size=64, epochs=100, source="This library's default for MLP heads."
        ),
        MinibatchProtocol(
            "ddae",
            standardize=False,
            source="DDAE, arXiv 2303.09769, linear.py of FutureXiang/ddae: Adam, no feature normalisation, cosine "
            "changed once an epoch. The source draws new noise, crops and flips for every image of every epoch and "
            "multiplies the rate by the number of GPUs (4 there); here features are computed once, on one process.",
        ),
        MinibatchProtocol(
            "mae",
            **_MAE_SCHEDULE,
            batch_norm="plain",
            norm_eps=1e-6,
            init_std=0.01,
            source="MAE, arXiv 2111.06377, main_linprobe.py and util/lars.py of facebookresearch/mae; the batch of "
            "16,384 is the paper's. The source crops and flips for every epoch; here features are computed once.",
        ),
        MinibatchProtocol(
            "repa",
            **_MAE_SCHEDULE,
            batch_norm="affine",
            source="REPA, arXiv 2410.06940: the authors say that they follow MAE (issues 32 and 55 of "
            "sihyun-yu/REPA) and show a BatchNorm1d with torch's default arguments before the linear layer. They "
            "released no code: that the schedule's numbers are MAE's is not verified.",
        ),
        MinibatchProtocol(
            "adam-maps",
            standardize=False,
            learning_rate=1e-3,
            batch_size=64,
            epochs=30,
            warmup_epochs=2,
            schedule="cosine_step",
            source="This library's default for heads on maps.",
        ),
        MinibatchProtocol(
            "gdc",
            **_DIFFSSL,
            learning_rate=1e-2,
            batch_size=128,
            source="GDC, arXiv 2307.08702, the linear head: " + _DIFFSSL_SOURCE.format("linear.sh"),
        ),
        MinibatchProtocol(
            "difformer",
            **_DIFFSSL,
            learning_rate=5e-2,
            batch_size=128,
            source="DifFormer, arXiv 2311.17921, and GDC's attention head: "
            + _DIFFSSL_SOURCE.format("{fusion,attention}.sh"),
        ),
        MinibatchProtocol(
            "diffeed",
            **_DIFFSSL,
            learning_rate=1e-2,
            batch_size=16,
            source="DifFeed, arXiv 2311.17921: " + _DIFFSSL_SOURCE.format("feedback.sh"),
        ),
    )
}


# Heads that classify images, and are fitted by a protocol.
Classifier = PooledHead | MapClassifier


def classifier_class(kind: str) -> type[PooledHead] | type[MapClassifier]:
    """The class of heads, on pooled features or on maps, of a name.

    Raises:
        ValueError: With the names there are.
    """
    found = head_class(kind, (PooledHead, MapClassifier))
    assert issubclass(found, (PooledHead, MapClassifier))
    return found


def get_protocol(protocol: str | Protocol | None, head: str) -> Protocol:
    """The protocol of a name, checked against the kind of head.

    Args:
        protocol: A name, with `@1` behind it only in that version; a protocol, or None for the head's default.
        head: A registered head on pooled features or on maps: `linear`, `mlp`, `knn`, `attention` or one's own.

    Raises:
        ValueError: For an unknown head or protocol, another version than this library's, or a protocol that cannot fit
            this head.

    Example:
        >>> get_protocol("ddae", "linear").epochs
        15
    """
    cls = classifier_class(head)
    chosen = cls.default_protocol if protocol is None else protocol
    if isinstance(chosen, str):
        chosen = _named(chosen)
    if not isinstance(chosen, Protocol):
        raise TypeError(f"protocol must be a name or a Protocol; got {type(chosen).__name__}.")
    if not chosen.fits(cls):
        fitted = [kind for kind, other in list_heads((PooledHead, MapClassifier)).items() if chosen.fits(other)]
        fitting = [p.name for p in PROTOCOLS.values() if p.fits(cls)]
        raise ValueError(
            f"Protocol {chosen.name!r} fits heads {', '.join(fitted) or 'none'}, not {head!r}; for {head!r} use "
            f"{' or '.join(fitting)}."
        )
    return chosen


def _named(text: str) -> Protocol:
    name, at, version = text.partition("@")
    if name not in PROTOCOLS:
        raise ValueError(f"Unknown protocol {text!r}; expected one of {', '.join(PROTOCOLS)}.")
    found = PROTOCOLS[name]
    if at and version != str(found.version):
        raise ValueError(
            f"Protocol {name!r} is version {found.version} here, and {text!r} was asked for: numbers of two versions "
            f"do not compare. Take the version of diffusers-repr that has it, or {name!r} as it is and measure anew."
        )
    return found
