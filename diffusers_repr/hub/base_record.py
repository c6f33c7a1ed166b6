"""What a probe, a head, a classifier or a store knows of the model under it, and the one check of another model.

Plain data: the model itself is read by `base_record` of `denoiser/` and by `Encoder.record`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffusers_repr.hub.schema import printable

_CLOSE = 1e-3  # how far numbers of one noise process may lie apart
_MARK = 0.02  # and weights of one network: the precision of bfloat16


@dataclass(frozen=True)
class Level:
    """A noise level: what was asked for, and what it came to.

    Attributes:
        requested: `{"timestep": ...}`, `{"nsr": ...}` or `{"half_log_snr": ...}`.
        timestep: As the network takes it.
        nsr: Noise-to-signal ratio; infinite for pure noise.
    """

    requested: Mapping[str, float]
    timestep: float
    nsr: float

    def same_as(self, other: Level) -> bool:
        """Whether both come to the same noise, to the precision at which schedulers round it."""
        if (self.nsr, self.timestep) == (other.nsr, other.timestep):
            return True
        close = abs(other.nsr - self.nsr) <= _CLOSE * abs(self.nsr) + 1e-9
        return close and abs(other.timestep - self.timestep) <= 1e-2 * max(self.timestep, 1)

    def __str__(self) -> str:
        return f"timestep {self.timestep:g} (nsr {self.nsr:.4g})"


@dataclass(frozen=True)
class ProcessRecord:
    """A forward process in a few numbers; what the network predicts is no part of it.

    Attributes:
        kind: `vp`, `ve`, `edm`, `flow`, `cosine_flow` or `patch_mask`.
        num_train_timesteps: T; None where it was not recorded.
        half_log_snr: Of `vp`, at timesteps evenly spread over the table; None where the signal is gone.
        sigmas: Of `edm` and `ve`: `sigma_min`, `sigma_max`, `sigma_data`.
        fingerprint: Hash of all of it to six digits; None where it was not recorded.
    """

    kind: str
    num_train_timesteps: int | None = None
    half_log_snr: Sequence[float | None] = ()
    sigmas: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str | None = None

    def same_as(self, other: ProcessRecord) -> bool:
        """Whether a timestep means the same noise in both, by what both recorded."""
        if self.kind != other.kind:
            return False
        if self.fingerprint is not None and other.fingerprint is not None:
            return self.fingerprint == other.fingerprint
        mine, theirs = ([*one.sigmas.values(), *one.half_log_snr] for one in (self, other))
        return (
            self.num_train_timesteps == other.num_train_timesteps
            and len(mine) == len(theirs)
            and all(
                a is b if a is None or b is None else math.isclose(a, b, rel_tol=_CLOSE, abs_tol=_CLOSE)
                for a, b in zip(mine, theirs, strict=True)
            )
        )

    def __str__(self) -> str:
        steps = "" if self.num_train_timesteps is None else f" of {self.num_train_timesteps} timesteps"
        parts = [f"{name} {value:g}" for name, value in self.sigmas.items()]
        if values := self.half_log_snr:
            ends = ["-inf" if (v := values[i]) is None else f"{v:.3f}" for i in (0, len(values) // 2, -1)]
            parts = [f"log(alpha/sigma) from {ends[0]} over {ends[1]} to {ends[2]}"]
        if self.fingerprint is not None:
            parts.append(f"fingerprint {self.fingerprint}")
        return f"{self.kind}{steps}" + (f" ({', '.join(parts)})" if parts else "")


@dataclass(frozen=True)
class BaseRecord:
    """A model, as what was made on it remembers it. Each format keeps the fields it needs; None is not recorded.

    Attributes:
        name: Hub id or folder, as it was given; None if it was built from parts.
        local: Whether `name` is a folder.
        revision: As it was given.
        commit: Commit of a Hub id, so that the same files are loaded again.
        model_class: Class of the network.
        config: The network's config without private keys; values that are its defaults may be left out.
        features: Layer -> its channels, or the values of its pooled feature.
        marks: Parameter -> its first values, by which other weights are noticed.
        fingerprint: Hash of class and config.
        process: The noise process.
        channels: Of x_0.
        latent_scale: Scaling factor of the VAE; None in pixels.
        dtype: Of the network.
        weights: A hash of the weights.
    """

    name: str | None = None
    local: bool = False
    revision: str | None = None
    commit: str | None = None
    model_class: str | None = None
    config: Mapping[str, Any] | None = None
    features: Mapping[str, int] = field(default_factory=dict)
    marks: Mapping[str, Sequence[float]] = field(default_factory=dict)
    fingerprint: str | None = None
    process: ProcessRecord | None = None
    channels: int | None = None
    latent_scale: float | None = None
    dtype: str | None = None
    weights: str | None = None


@dataclass(frozen=True)
class Dependent:
    """What was made on a base, in the words of the messages.

    Attributes:
        name: Such as `ReadoutHead`.
        noun: Such as `head`.
        verb: What was done on the base: `trained`, `fitted`.
        remedy: What to try.
    """

    name: str
    noun: str
    verb: str
    remedy: str

    def refusal(self, came: BaseRecord, has: str, on: str, was: BaseRecord, why: str = "") -> ValueError:
        """The one message on a wrong base: what came, what it was made on, what to try."""
        return ValueError(
            f"Wrong base for this {self.name}: {called(came)} {has}; the {self.noun} was {self.verb} on {on} "
            f"({called(was, 'a model without a name')}){why and f': {why}'}. {self.remedy}"
        )


def called(base: BaseRecord, otherwise: str = "the given model") -> str:
    """The name of a base in messages."""
    return otherwise if base.name is None else repr(base.name)


def refuse_other_class(dependent: Dependent, was: BaseRecord, came: BaseRecord) -> None:
    """Refuse a network of another class.

    Raises:
        ValueError: See `Dependent.refusal`; so do the other checks.
    """
    if was.model_class is not None and came.model_class != was.model_class:
        raise dependent.refusal(came, f"is a {came.model_class}", f"a {was.model_class}", was)


def refuse_other_config(dependent: Dependent, was: BaseRecord, came: BaseRecord, defaults: Mapping[str, Any]) -> None:
    """Refuse a network of another config, by the configs where both are known, else by their fingerprint."""
    if was.config is not None:
        differing = config_differences(was, came, defaults)
        if differing:
            raise dependent.refusal(came, f"has another config ({'; '.join(differing)})", f"a {was.model_class}", was)
    elif was.fingerprint is not None and came.fingerprint != was.fingerprint:
        raise dependent.refusal(came, f"has the fingerprint {came.fingerprint}", str(was.fingerprint), was)


def config_differences(was: BaseRecord, came: BaseRecord, defaults: Mapping[str, Any]) -> list[str]:
    """`key is ..., was ...` for each difference; what a config leaves out has its default.

    Example:
        >>> was, came = BaseRecord(config={"depth": 2}), BaseRecord(config={"depth": 3, "dropout": 0.0})
        >>> config_differences(was, came, {"dropout": 0.0})
        ['depth is 3, was 2']
    """
    old, new = ({**defaults, **(one.config or {})} for one in (was, came))
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [f"{printable(key)} is {_brief(new.get(key))}, was {_brief(old.get(key))}" for key in keys]


def refuse_missing_layers(dependent: Dependent, was: BaseRecord, came: BaseRecord, known: Iterable[str]) -> None:
    """Refuse a network that lacks a recorded layer; `known` are all it has."""
    known = list(known)
    present = set(known)
    missing = [layer for layer in was.features if layer not in present]
    if missing:
        near = difflib.get_close_matches(missing[0], known, n=3, cutoff=0.4)
        has = f"has no layer {', '.join(map(repr, missing))} (closest: {near})"
        raise dependent.refusal(came, has, ", ".join(map(repr, was.features)), was)


def refuse_other_sizes(dependent: Dependent, was: BaseRecord, came: BaseRecord, found: Mapping[str, int]) -> None:
    """Refuse layers that give another number of values than was recorded; those that `found` lacks are left out."""
    for layer, size in was.features.items():
        if found.get(layer, size) != size:
            raise dependent.refusal(came, f"gives {found[layer]} values at layer {layer!r}", f"{size}", was)


def refuse_other_process(dependent: Dependent, was: BaseRecord, came: BaseRecord) -> None:
    """Refuse another noise process."""
    if was.process is not None and came.process is not None and not was.process.same_as(came.process):
        why = "the same timestep means another noise; give the base its own scheduler"
        raise dependent.refusal(came, f"has the noise process {came.process}", f"{was.process}", was, why)


def refuse_other_levels(
    dependent: Dependent, was: BaseRecord, came: BaseRecord, recorded: Sequence[Level], found: Sequence[Level]
) -> None:
    """Refuse noise levels that come to another noise than was recorded."""
    for old, new in zip(recorded, found, strict=True):
        if not old.same_as(new):
            asked = ", ".join(f"{key}={value:g}" for key, value in old.requested.items())
            why = "the noise schedules differ; give the base its own scheduler"
            raise dependent.refusal(came, f"has {new} for {asked}", f"{old}", was, why)


def refuse_other_inputs(dependent: Dependent, was: BaseRecord, came: BaseRecord) -> None:
    """Refuse an x_0 of other channels, or on another scale; a scale that `came` does not tell is left out."""
    if was.channels is not None and came.channels != was.channels:
        raise dependent.refusal(came, f"takes x_0 of {came.channels} channels", f"x_0 of {was.channels}", was)
    old, new = was.latent_scale, came.latent_scale
    if new is not None and (old is None or not math.isclose(new, old, rel_tol=1e-5)):
        on = "pixels" if old is None else f"latents scaled by {old:g}"
        raise dependent.refusal(came, f"works on latents scaled by {new:g}", on, was)


def same_marks(was: BaseRecord, came: BaseRecord) -> bool:
    """Whether the marked weights are those recorded, to the precision of bfloat16; True where `came` has none."""
    for name, expected in was.marks.items():
        found = came.marks.get(name)
        if found is None:
            continue
        if len(found) != len(expected):
            return False
        bound = _MARK * max(map(abs, expected))
        if not all(abs(a - b) <= bound for a, b in zip(found, expected, strict=True)):  # NaN is another weight
            return False
    return True


def _brief(value: Any) -> str:
    return printable(repr(value))[:200]


__all__ = [
    "BaseRecord",
    "Dependent",
    "Level",
    "ProcessRecord",
    "called",
    "config_differences",
    "refuse_missing_layers",
    "refuse_other_class",
    "refuse_other_config",
    "refuse_other_inputs",
    "refuse_other_levels",
    "refuse_other_process",
    "refuse_other_sizes",
    "same_marks",
]
