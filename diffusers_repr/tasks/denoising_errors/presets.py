"""The paper's schedules, by the name of its data sets (section 6 of its code's commands; arXiv 2303.16203)."""

from __future__ import annotations

from diffusers_repr.tasks.denoising_errors.racing import Racing
from diffusers_repr.tasks.denoising_errors.rules import AdaptiveSchedule, Averaging, Rule

_FOUR = ((20, 50, 100, 500), (20, 10, 5, 1))
# Data set -> (levels up to each stage, classes kept after it, loss).
PRESETS: dict[str, tuple[AdaptiveSchedule, str]] = {
    name: (AdaptiveSchedule(*schedule), loss)
    for name, schedule, loss in (
        ("food", _FOUR, "l2"),
        ("cifar10", ((50, 500), (5, 1)), "l1"),
        ("aircraft", _FOUR, "l2"),
        ("pets", ((25, 250), (5, 1)), "l1"),
        ("flowers", _FOUR, "l1"),
        ("stl10", ((100, 500), (5, 1)), "l1"),
        ("imagenet", ((50, 100, 500, 1000), (500, 50, 10, 1)), "l2"),
        ("objectnet", ((50, 100, 500, 1000), (25, 10, 5, 1)), "l2"),
    )
}


RACING = Racing(n_levels=4, max_rounds=25)


def rule_and_loss(rule: str | Rule, loss: str | None) -> tuple[Rule, str]:
    """A rule by name or as it is, and the loss: as given, else the preset's, else `l2`.

    Args:
        rule: `racing`, `averaging`, a data set of `PRESETS`, or a `Rule`.
        loss: See `Loss`.

    Raises:
        ValueError: For a name that there is not.
    """
    if isinstance(rule, Rule):
        return rule, loss or "l2"
    plain: dict[str, Rule] = {"racing": RACING, "averaging": Averaging()}
    if rule in plain:
        return plain[rule], loss or "l2"
    if rule in PRESETS:
        found, own = PRESETS[rule]
        return found, loss or own
    if rule == "calibrated":
        raise ValueError("rule='calibrated' is learned from labelled images: see ZeroShotClassifier.fit.")
    names = ", ".join([*plain, *PRESETS])
    raise ValueError(f"rule={rule!r} is none that is known; take one of {names}, or a Rule: Racing(error=0.01).")


__all__ = ["PRESETS", "RACING", "rule_and_loss"]
