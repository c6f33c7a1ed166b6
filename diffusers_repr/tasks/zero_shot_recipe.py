"""What a zero-shot classifier is, as plain data: `zero_shot.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

from diffusers_repr.hub.base_record import BaseRecord, Level
from diffusers_repr.hub.schema import (
    Check,
    anything,
    integer,
    listing,
    mapping,
    number,
    one_of,
    optional,
    record,
    shown,
    text,
)
from diffusers_repr.tasks.denoising_errors.calibration import Calibration
from diffusers_repr.tasks.denoising_errors.classes import ZeroShotClasses
from diffusers_repr.tasks.denoising_errors.likelihood import CalibratedRacing
from diffusers_repr.tasks.denoising_errors.racing import Racing
from diffusers_repr.tasks.denoising_errors.rules import AdaptiveSchedule, Averaging, Rule
from diffusers_repr.tasks.denoising_errors.scores import LOSSES
from diffusers_repr.tasks.recipe import Score
from diffusers_repr.tasks.recipe_schema import base_check, level_check

RULES: dict[str, type[Rule]] = {
    "racing": Racing,
    "calibrated": CalibratedRacing,
    "averaging": Averaging,
    "adaptive": AdaptiveSchedule,
}


@dataclass(frozen=True)
class ZeroShotRecipe:
    """Everything between an image and its class.

    Attributes:
        base: The model.
        classes: Names and prompts, or ids.
        rule: Which pairs are evaluated, and who wins.
        loss: Distance of two noises.
        ensemble: How several prompts of a class count.
        seed: Of the noise.
        image_size: (H, W) in pixels.
        resize: `crop`: the shorter side is brought to size and the middle taken; `stretch`: both sides are.
        levels: What the rule's levels come to in the base's noise process, by which another process is noticed.
        calibration: What was learned of the levels; None: nothing.
        train: Data set, split and rows of the calibration; None without.
        scores: What was measured.
        versions: Of the libraries.
    """

    NOUN: ClassVar[str] = "zero-shot classifier"
    FILE: ClassVar[str] = "zero_shot.json"
    FORMAT: ClassVar[str] = "diffusers_repr.zero_shot/1"
    MODELS: ClassVar[tuple[str, ...]] = ("base",)  # its records of models

    base: BaseRecord
    classes: ZeroShotClasses
    rule: Rule
    loss: str
    ensemble: str
    seed: int
    image_size: tuple[int, int]
    resize: str
    levels: tuple[Level, ...]
    calibration: Calibration | None
    train: Mapping[str, Any] | None
    scores: tuple[Score, ...]
    versions: Mapping[str, str]

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.classes.names

    @property
    def rule_name(self) -> str:
        """`racing`, `averaging` or `adaptive`; the class of a rule of one's own."""
        return next((name for name, kind in RULES.items() if type(self.rule) is kind), type(self.rule).__name__)

    def with_scores(self, scores: Sequence[Score]) -> Self:
        """A copy in which these scores replace those of the same name, data set and split."""
        new = {(s.name, s.dataset, s.split) for s in scores}
        kept = [s for s in self.scores if (s.name, s.dataset, s.split) not in new]
        return replace(self, scores=(*kept, *scores))

    def with_base(self, name: str, revision: str | None = None) -> Self:
        """A copy whose base is the Hub id `name`."""
        return replace(self, base=replace(self.base, name=name, local=False, revision=revision, commit=None))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON.

        Raises:
            ValueError: For a rule of one's own, which no file can hold.
        """
        if self.rule_name not in RULES:
            raise ValueError(f"A {self.rule_name} cannot be saved; rules that can are {', '.join(RULES)}.")
        plain = asdict(self)
        plain["base"] = {name: plain["base"][name] for name in _BASE}
        plain["rule"] = {"kind": self.rule_name, **plain["rule"]}
        return {"format": self.FORMAT, **plain}

    @classmethod
    def from_dict(cls, data: Any, source: str | None = None) -> Self:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If it is no recipe of this format; names `source` and the field.
        """
        source = source or cls.FILE
        if not isinstance(data, dict) or data.get("format") != cls.FORMAT:
            came = shown(data.get("format")) if isinstance(data, dict) else shown(data)
            raise ValueError(f"{source} is no {cls.NOUN}'s recipe: its format must be {cls.FORMAT!r}; got {came}.")
        try:
            found = _RECIPE({name: value for name, value in data.items() if name != "format"}, cls.FILE)
            return cls(**_made(found))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{source} is damaged or was edited ({error}). Take it from its source again.") from error


_BASE = ("name", "local", "revision", "commit", "model_class", "config", "features", "marks")
_NAMES = listing(text(1000), 2, 100_000, distinct=True)
_TIMES = listing(number(), 1, 100_000)
_WHOLES = listing(integer(1, 1_000_000), 1, 100)
_RULES: dict[str, Check] = {
    "racing": record(
        {
            "kind": one_of("racing"),
            "error": number(0, 1),
            "n_levels": integer(1, 100_000),
            "at": optional(_TIMES),
            "max_rounds": integer(1, 1_000_000),
            "effect": number(0),
        }
    ),
    "calibrated": record({"kind": one_of("calibrated"), "at": _TIMES, "scales": _TIMES, "error": number(0, 1)}),
    "averaging": record({"kind": one_of("averaging"), "n_levels": integer(1, 100_000), "at": optional(_TIMES)}),
    "adaptive": record({"kind": one_of("adaptive"), "n_samples": _WHOLES, "to_keep": _WHOLES}),
}


def _rule(value: Any, at: str) -> dict[str, Any]:
    kind = value.get("kind") if isinstance(value, Mapping) else None
    return _RULES[one_of(*_RULES)(kind, f"{at}.kind")](value, at)


_RECIPE = record(
    {
        "base": base_check,
        "classes": record(
            {
                "names": _NAMES,
                "prompts": optional(listing(listing(text(10_000), 1, 1000), 2, 100_000)),
                "class_labels": optional(listing(integer(0, 1 << 31), 2, 100_000)),
            }
        ),
        "rule": _rule,
        "loss": one_of(*LOSSES),
        "ensemble": one_of("mean", "best"),
        "seed": integer(-(1 << 63), (1 << 64) - 1),
        "image_size": listing(integer(1, 1 << 16), 2, 2),
        "resize": one_of("crop", "stretch"),
        "levels": listing(level_check, 1, 100_000),
        "calibration": optional(
            record(
                {
                    "timesteps": _TIMES,
                    "telling": _TIMES,
                    "effect": number(0),
                    "rows": integer(1),
                    "scale": optional(number(0)),
                }
            )
        ),
        "train": optional(mapping(anything(4, 10_000), 0, 100)),
        "scores": listing(
            record(
                {
                    "name": text(200),
                    "value": number(),
                    "dataset": text(1000),
                    "split": text(200),
                    "rows": integer(0),
                }
            ),
            0,
            10_000,
        ),
        "versions": mapping(text(200), 0, 100),
    }
)


def _made(found: dict[str, Any]) -> dict[str, Any]:
    rule = dict(found["rule"])
    kind = RULES[rule.pop("kind")]
    rule = {name: tuple(value) if isinstance(value, list) else value for name, value in rule.items()}
    classes, calibration = found["classes"], found["calibration"]
    prompts = classes["prompts"]
    found["rule"] = kind(**rule)
    found["classes"] = ZeroShotClasses(
        tuple(classes["names"]),
        None if prompts is None else tuple(map(tuple, prompts)),
        None if classes["class_labels"] is None else tuple(classes["class_labels"]),
    )
    if calibration is not None:
        lists = {name: tuple(calibration[name]) for name in ("timesteps", "telling")}
        found["calibration"] = Calibration(**{**calibration, **lists})
    found["base"] = BaseRecord(**found["base"])
    found["levels"] = tuple(Level(**level) for level in found["levels"])
    found["scores"] = tuple(Score(**score) for score in found["scores"])
    found["image_size"] = tuple(found["image_size"])
    assert set(found) == {field.name for field in fields(ZeroShotRecipe)}
    return found


__all__ = ["RULES", "ZeroShotRecipe"]
