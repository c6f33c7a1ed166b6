"""`check_conditioner`: what training, sampling and guidance rely on in a conditioner."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.testing.checks import expect, expect_close, leaving_alone


def check_conditioner(denoiser: Denoiser, batch: Mapping[str, Any]) -> None:
    """Check that the conditioner of a denoiser keeps its contract on a batch of training data.

    The condition must reach the network; a dropped one must be the null one, for its sample alone; what
    `Denoiser.condition` gives must be what training gives.

    Args:
        denoiser: Of a small network whose weights act, with the conditioner by `conditioner=`.
        batch: At least two samples, the first two with different conditions.

    Raises:
        AssertionError: Naming what does not hold.
    """
    conditioner = denoiser.conditioner
    name = type(conditioner).__name__
    conditioner.check_batch(batch, 0.0)
    count = len(batch[conditioner.columns[0]])
    values = conditioner.from_batch(batch, count)
    for part in _parts(values):
        expect(len(part) == count, f"{name}.from_batch gave {len(part)} values of {count} samples.")
    kept = copy.deepcopy(values)
    with denoiser.evaluating(), torch.no_grad(), leaving_alone(f"{name}.inputs", denoiser.model):
        plain = _predict(denoiser, conditioner.inputs(values), count)
        turned = [_predict(denoiser, conditioner.inputs(other), count) for other in _swapped(values)]
        asked = denoiser.condition(**{conditioner.argument: values}, batch=count).kwargs()
        for at, other in enumerate(turned):
            which = "the condition" if len(turned) == 1 else f"part {at} of the condition"
            expect(not torch.allclose(plain[:2], other[:2]), f"{name}: {which} does not reach the network.")
        expect_close(
            _predict(denoiser, asked, count), plain, f"Predictions by denoiser.condition and by {name}.inputs"
        )
        if conditioner.has_null:
            _dropped(denoiser, values, count, plain)
    same = [
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(_parts(values), _parts(kept), strict=True)
    ]
    expect(all(same), f"{name}.inputs changes the values it is given.")
    _draws(denoiser, values, count)
    description = conditioner.describe()
    expect(json.loads(json.dumps(description)) == description, f"{name}.describe is no plain data: {description}.")


def _dropped(denoiser: Denoiser, values: Any, count: int, plain: Tensor) -> None:
    """The null condition by itself, for all and for one sample."""
    conditioner = denoiser.conditioner
    name = type(conditioner).__name__
    first = torch.arange(count) == 0
    null = _predict(denoiser, conditioner.null(count), count)
    for mask in (torch.ones(count, dtype=torch.bool), first):
        found = _predict(denoiser, conditioner.inputs(values, mask), count)
        expect_close(found[mask], null[mask], f"Predictions of samples that {name} drops, and of its null")
        expect_close(found[~mask], plain[~mask], f"Predictions of samples beside one that {name} drops")
    expect(not torch.allclose(null, plain), f"{name}: the null condition is the condition.")


def _draws(denoiser: Denoiser, values: Any, count: int) -> None:
    conditioner = denoiser.conditioner
    draws = [conditioner.draw_dropped(values, 0.5, torch.Generator().manual_seed(seed)) for seed in (*range(40), 0)]
    stacked = torch.stack([torch.zeros(count, dtype=torch.bool) if draw is None else draw for draw in draws])
    name = f"{type(conditioner).__name__}.draw_dropped"
    expect(torch.equal(stacked[0], stacked[-1]), f"{name} does not draw by the generator alone.")
    expect(bool((stacked[:, 0] != stacked[:, 1]).any()), f"{name} drops all samples of a batch together.")
    none, whole = (conditioner.draw_dropped(values, chance) for chance in (0.0, 1.0))
    expect(none is None or not bool(none.any()), f"{name} drops at a chance of 0.")
    expect(whole is not None and bool(whole.all()), f"{name} keeps some at a chance of 1.")


def _parts(values: Any) -> tuple[Any, ...]:
    """The values of each condition: of several a tuple has one entry each."""
    return values if isinstance(values, tuple) else (values,)


def _swapped(values: Any) -> list[Any]:
    """The values with the first two samples in each other's place: of several conditions, each by itself."""
    swapped = []
    for part in _parts(values):
        order = [1, 0, *range(2, len(part))]
        swapped.append(part[order] if isinstance(part, Tensor) else [part[at] for at in order])
    if not isinstance(values, tuple):
        return swapped
    return [tuple(new if at == place else old for place, old in enumerate(values)) for at, new in enumerate(swapped)]


def _predict(denoiser: Denoiser, inputs: Mapping[str, Any], count: int) -> Tensor:
    """One prediction for each sample, at the same noise and level."""
    generator = torch.Generator().manual_seed(0)
    size = [side // denoiser.stride for side in denoiser.image_size]
    channels = denoiser.image_channels if denoiser.vae is None else denoiser.family.channels()
    x_t = torch.randn(1, channels, *size, generator=generator).expand(count, -1, -1, -1).to(denoiser.dtype)
    middle = round(sum(denoiser.schedule.timestep_range) / 2)
    return denoiser.predict(x_t, middle, inputs).output


__all__ = ["check_conditioner"]
