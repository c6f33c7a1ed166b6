"""`check_family`: what a family tells, what it lacks for features, guidance and training, and what is wrong in it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.denoiser.require import require_denoiser
from diffusers_repr.denoiser.sizes import ImageSize
from diffusers_repr.testing import family_calls, family_methods
from diffusers_repr.testing.checks import leaving_alone
from diffusers_repr.testing.family_case import FamilyCase, Lacks, Wrong, make_case

State = Literal["ok", "lacks", "wrong", "not tried"]

# What is checked, in order: each gives a sentence, or raises; and what of a family it is about.
PARTS: dict[str, tuple[Callable[[FamilyCase], str], str]] = {
    "call": (family_calls.check_call, "channels, size, inputs, timestep, output"),
    "rows": (family_calls.check_rows, "unbatched, condition_rows"),
    "features": (family_calls.check_features, "grid, image_tokens, not_image, block_outputs, example"),
    "guidance": (family_calls.check_names, "sample_name, timestep_name, training_timestep, with_sample, with_output"),
    "PAG": (family_methods.check_pag, "attentions, image_tokens, layer_defaults"),
    "CFG": (family_methods.check_cfg, "classes, from_class_labels"),
    "EnergyGuidance": (family_methods.check_energy, "output, with_sample, grid"),
    "training": (family_methods.check_training, "inputs, output, from_class_labels"),
    "REPA": (family_methods.check_repa, "stacks, layer_defaults, grid"),
}


@dataclass(frozen=True)
class FamilyFinding:
    """What was found of one part.

    Attributes:
        part: One of `call`, `rows`, `features`, `guidance`, `PAG`, `CFG`, `EnergyGuidance`, `training`, `REPA`.
        state: `ok`; `lacks`: the family does not tell what this needs; `wrong`: what it tells does not hold;
            `not tried`, because the network could not be called.
        text: What it is, and what to write.
    """

    part: str
    state: State
    text: str


@dataclass(frozen=True)
class FamilyReport:
    """What `check_family` found; printed, it is a table.

    Attributes:
        family: Class of the adapter.
        model: Class of the network.
        findings: One a part, in order.
    """

    family: str
    model: str
    findings: tuple[FamilyFinding, ...]

    def __getitem__(self, part: str) -> FamilyFinding:
        return next(finding for finding in self.findings if finding.part == part)

    @property
    def wrong(self) -> tuple[str, ...]:
        """Parts in which something does not hold."""
        return tuple(finding.part for finding in self.findings if finding.state == "wrong")

    def __str__(self) -> str:
        lines = [f"{self.family} of {self.model}"]
        lines += [f"  {found.part:<14} {found.state:<9} {found.text}".rstrip() for found in self.findings]
        return "\n".join(lines)


def check_family(
    denoiser: Denoiser, *, image_size: ImageSize = None, parts: Sequence[str] | None = None, **condition: Any
) -> FamilyReport:
    """Try a family on a small network: its call, features, PAG, CFG, energy guidance, training and REPA.

    What the family does not tell, and the network may well not have, is reported as lacking, with what to write; what
    it tells and does not hold is an error. The network, its modes, hooks and gradients are left as they were.

    Args:
        denoiser: Of a small network whose weights act; for text models from a pipeline that encodes prompts, or with
            `embeddings=`.
        image_size: Of the images it is tried with, (H, W) with H != W where the network takes such; its own if None.
        parts: Which to try beside `call`; all if None.
        **condition: As `Denoiser.condition` takes it; two class ids, or two prompts, if nothing is said.

    Returns:
        The report; print it.

    Raises:
        ValueError: For a part that there is none of.
        AssertionError: With the whole report, if a part is wrong.

    Example:
        >>> from diffusers_repr.testing import tiny_denoiser
        >>> print(check_family(tiny_denoiser())["PAG"].state)
        ok
    """
    require_denoiser(denoiser)
    unknown = sorted({*(parts or ())} - {*PARTS})
    if unknown:
        raise ValueError(f"parts={unknown}; there are {', '.join(PARTS)}.")
    chosen = [name for name in PARTS if name != "call" and (parts is None or name in parts)]
    findings: list[FamilyFinding] = []
    with leaving_alone("check_family", denoiser.model), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        case = _tried("call", lambda: make_case(denoiser, image_size, condition))
        findings.append(case if isinstance(case, FamilyFinding) else _found("call", case))
        if findings[0].state == "ok":
            findings += [_found(name, case) for name in chosen]
        else:
            findings += [FamilyFinding(name, "not tried", "") for name in chosen]
    report = FamilyReport(type(denoiser.family).__name__, type(denoiser.model).__name__, tuple(findings))
    if report.wrong:
        raise AssertionError(f"Something is wrong in {', '.join(report.wrong)}.\n{report}")
    return report


def _found(name: str, case: FamilyCase) -> FamilyFinding:
    text = _tried(name, lambda: PARTS[name][0](case))
    return text if isinstance(text, FamilyFinding) else FamilyFinding(name, "ok", text)


def _tried(name: str, run: Callable[[], Any]) -> Any:
    """What it gives, or the finding that it raised."""
    try:
        return run()
    except Lacks as found:
        return FamilyFinding(name, "lacks", str(found))
    except Wrong as found:
        return FamilyFinding(name, "wrong", str(found))
    except Exception as error:  # whatever an adapter does
        text = " ".join(str(error).split())[:600]
        hint = "" if isinstance(error, ValueError) else f" (Look at {PARTS[name][1]}.)"  # ours say what to write
        return FamilyFinding(name, "wrong", f"{type(error).__name__}: {text}{hint}")


__all__ = ["FamilyFinding", "FamilyReport", "check_family"]
