"""What `check_family` asks of a family's call and of its layers."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.capture import capture
from diffusers_repr.denoiser import Layer, list_layers
from diffusers_repr.denoiser.condition import forward_names
from diffusers_repr.testing.family_case import FamilyCase, Lacks, Wrong


def check_call(case: FamilyCase) -> str:
    """The network takes the inputs, and the prediction has the shape of x_t."""
    family, x_t = case.denoiser.family, case.x_t
    inputs = case.inputs()
    names = forward_names(case.denoiser.model)
    unknown = [name for name in inputs if name not in names]
    if unknown and not _takes_any(case):
        raise Wrong(
            f"`inputs` gives {', '.join(map(repr, unknown))}, and the forward takes {', '.join(names)}. Set "
            "sample_name and timestep_name to its names, or write `def inputs(self, x_t, level, condition)`."
        )
    with case.denoiser.evaluating(), torch.no_grad():
        raw = case.denoiser.model(**inputs)
    read = family.output(raw, x_t)
    if read.shape != x_t.shape:
        raise Wrong(
            f"`output` gives {tuple(read.shape)} for x_t {tuple(x_t.shape)}. Write `def output(self, raw, x_t)`: the "
            "prediction in what the forward returned."
        )
    if not bool(read.isfinite().all()):
        raise Wrong("the prediction holds NaN or infinity.")
    return f"{type(case.denoiser.model).__name__}({', '.join(inputs)}) at images of {_sides(case.size)}"


def check_rows(case: FamilyCase) -> str:
    """A sample is predicted alike alone and beside another."""
    both, (first,) = case.output(), [case.output(case.condition.take([0]), case.x_t[:1])]
    if not _close(first, both[:1]):
        raise Wrong(
            f"a sample alone is predicted otherwise than beside another, by {_apart(first, both[:1]):.3g}. Name "
            "inputs without a batch dimension in `unbatched`; see that `inputs` mixes no rows."
        )
    return ""


def check_features(case: FamilyCase) -> str:
    """What the layer table says is what is read, and where the image is said to be is where it is."""
    denoiser = case.denoiser
    try:
        layers = list_layers(denoiser, case.size)
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise Wrong(
            f"the layer table cannot be made ({type(error).__name__}: {text}). It runs the network on the meta device "
            "with `example(batch, device)`, condition inputs of the right shapes: write it."
        ) from error
    if not layers:
        raise Lacks(
            "no layer gives an image. Write `def grid(self, tokens, size)`: the grid of a sequence of so many tokens, "
            "and its first token; and `block_outputs` for blocks that return several tensors."
        )
    with denoiser.evaluating(), torch.no_grad(), capture(denoiser.model, [layer.path for layer in layers]) as tape:
        denoiser.predict(case.x_t, case.level, case.condition)
    for layer in layers:
        read = denoiser.feature_map(layer.path, tape[layer.path], case.latent)
        wanted = (2, layer.channels, *layer.grid)
        if tuple(read.as_map().shape) != wanted:
            raise Wrong(f"{layer.path!r} gives {tuple(read.as_map().shape)}, and the layer table says {wanted}.")
    _check_place(case, layers)
    stacks = denoiser.family.blocks(denoiser.model)
    return f"{len(layers)} layers, of them {len(stacks)} in stacks of blocks"


def _check_place(case: FamilyCase, layers: list[Layer]) -> None:
    """In the first sequence that holds more than the image, another x_t changes the image's tokens most."""
    denoiser, other = case.denoiser, case.x_t.flip(0)
    for layer in layers:
        if layer.kind != "tokens":
            continue
        values = []
        for x_t in (case.x_t, other):
            with denoiser.evaluating(), torch.no_grad(), capture(denoiser.model, layer.path) as tape:
                denoiser.predict(x_t, case.level, case.condition)
            values.append(tape[layer.path].float())
        cells, tokens = math.prod(layer.grid), values[0].shape[1]
        place = denoiser.token_grid(layer.path, tokens, case.latent)
        if place is None or tokens == cells:
            continue
        change = (values[0] - values[1]).norm(dim=-1).mean(0)
        sums = change.unfold(0, cells, 1).sum(-1)
        best = int(sums.argmax())
        if float(sums[best]) > 1.05 * float(sums[place[1]]):
            raise Wrong(
                f"{layer.path!r} has {tokens} tokens, of which `grid` says that the image's are the {cells} from "
                f"{place[1]} on; those from {best} on change most with x_t. `grid` returns ((h, w), first token)."
            )
        return


def check_names(case: FamilyCase) -> str:
    """What guidance reads of a call and puts into it: x_t, the level, the prediction."""
    family, inputs, x_t = case.denoiser.family, case.inputs(), case.x_t
    for attribute, value in (("sample_name", x_t), ("timestep_name", None)):
        name = getattr(family, attribute)
        if name not in inputs:
            near = [key for key, given in inputs.items() if isinstance(given, Tensor) and _is_it(given, value)]
            hint = f"{attribute} = {near[0]!r}" if len(near) == 1 else f"{attribute}, the name in the forward"
            raise Wrong(f"{attribute} is {name!r}, and `inputs` gives {', '.join(inputs)}. Write `{hint}`.")
    if not torch.equal(family.sample(inputs), x_t):
        raise Wrong("`sample(inputs)` is not the x_t that the inputs were made of. Write it, and `with_sample`.")
    other = x_t.flip(0)
    if not torch.equal(family.sample(family.with_sample(inputs, other)), other):
        raise Wrong("`with_sample(inputs, x_t)` does not put x_t where `sample` finds it.")
    _check_timestep(case)
    with case.denoiser.evaluating(), torch.no_grad():
        raw = case.denoiser.model(**inputs)
    raw = family.stacked_output(raw if isinstance(raw, Tensor) else raw[0])
    if not _close(family.output(family.with_output(raw, other), x_t), other):
        raise Wrong("`with_output(raw, prediction)` does not put the prediction where `output` finds it. Write it.")
    return ""


def _check_timestep(case: FamilyCase) -> None:
    denoiser, family = case.denoiser, case.denoiser.family
    low, high = denoiser.schedule.timestep_range
    for share in (0.25, 0.75):
        wanted = low + share * (high - low)
        level = denoiser.level(round(wanted) if high - low > 2 else wanted)
        given = denoiser.network_inputs(case.x_t, level, case.condition.kwargs())[family.timestep_name]
        back = float(family.training_timestep(torch.as_tensor(given).flatten()[0]))
        if not math.isclose(back, float(level.timestep), rel_tol=1e-2, abs_tol=1e-3):
            first = float(torch.as_tensor(given).flatten()[0])
            raise Wrong(
                f"at timestep {float(level.timestep):g} the network is told {first:g}, which `training_timestep` "
                f"reads as {back:g}. Write it: the inverse of `timestep`."
            )


def _is_it(given: Tensor, wanted: Tensor | None) -> bool:
    """Whether an input is x_t; of the timestep, whether it may be: one number a row."""
    if wanted is not None:
        return given.shape == wanted.shape and bool(torch.equal(given, wanted))
    return given.ndim <= 1


def _takes_any(case: FamilyCase) -> bool:
    parameters = inspect.signature(type(case.denoiser.model).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _close(found: Tensor, wanted: Tensor) -> bool:
    scale = max(1.0, float(wanted.abs().max()))
    return _apart(found, wanted) < 2e-3 * scale


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max()) if found.shape == wanted.shape else math.inf


def _sides(size: tuple[Any, ...]) -> str:
    return " x ".join(map(str, size))


__all__ = ["check_call", "check_features", "check_names", "check_rows"]
