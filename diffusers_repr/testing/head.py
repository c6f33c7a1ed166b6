"""`check_head`: is a class of heads ready to be fitted, saved and loaded by its name?"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from diffusers_repr.heads import (
    PROTOCOLS,
    Head,
    MapClassifier,
    MapHead,
    PooledHead,
    fit_head,
    fit_map_head,
    list_heads,
)
from diffusers_repr.heads.fitting.fit import accuracy_of
from diffusers_repr.heads.fitting.maps import map_accuracy
from diffusers_repr.testing.checks import expect, expect_close, leaving_alone


def check_head(
    head: Head, inputs: Mapping[str, Any], *, fits: bool = True, apart: Sequence[str] = (), **options: Any
) -> None:
    """Hold a head to the contract of heads.

    It must be registered, give float32 in all forms of output, be saved and loaded, give every parameter a gradient.
    By itself it gives a tensor, or, where it has several, an output object with them. A `PooledHead`, a `MapHead` and
    a `MapClassifier` must run in half precision on float32 features, and the first and the last must learn classes
    that lie apart.

    Args:
        head: One with drawn weights.
        inputs: Arguments of its call by name, float32, for at least two samples.
        fits: Whether to fit a new one of its kind too, where it is a `PooledHead` or a `MapClassifier`.
        apart: Its parts that make the inputs of its call, and that no gradient of the call reaches.
        **options: Of its class, for fitting.

    Raises:
        AssertionError: With what was found and what is expected.
    """
    name = type(head).__name__
    known = list_heads()
    expect(known.get(head.kind or "") is type(head), f"{name} is not registered: decorate it by register_head(...).")
    head.eval()
    with torch.no_grad(), leaving_alone(f"A call of {name} in eval mode", head):
        plain = head(**inputs)
        output, parts = head(**inputs, return_dict=True), head(**inputs, return_dict=False)
    alone, wanted = isinstance(plain, Tensor), _tensors(plain)
    told = f"{name} gives a {type(plain).__name__} by itself; expected the tensor, or an output object with several."
    expect(alone or (isinstance(plain, BaseOutput) and len(plain.to_tuple()) > 1), told)
    for one in wanted:
        expect(one.dtype == torch.float32, f"{name} gives {one.dtype} of float32; expected torch.float32.")
        expect(not bool((one.isnan() | (one == torch.inf)).any()), f"{name} gives NaN or infinity.")
    count = 1 if alone else len(plain.to_tuple())
    size = "one" if alone else str(count)
    right = isinstance(parts, tuple) and len(parts) == count
    expect(right, f"{name}(..., return_dict=False) is no tuple of {size}.")
    for form, found in (("return_dict=True", output), ("return_dict=False", parts)):
        expect(_equal(_tensors(found), wanted), f"{name}(..., {form}) differs from the call without it.")
    _saved(head, inputs, wanted)
    if isinstance(head, (PooledHead, MapHead, MapClassifier)):
        _in_half(head, inputs, plain)
    _trained(head, inputs, apart)
    if fits and isinstance(head, PooledHead):
        _fitted(head, options)
    if fits and isinstance(head, MapClassifier) and head.reads_once:
        _fitted_on_maps(head, options)


def _tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in its order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.to_tuple() if isinstance(output, BaseOutput) else output
    return [tensor for part in parts for tensor in _tensors(part)] if isinstance(parts, (list, tuple)) else []


def _equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def _saved(head: Head, inputs: Mapping[str, Any], wanted: list[Tensor]) -> None:
    name = type(head).__name__
    with tempfile.TemporaryDirectory() as folder:
        head.save_pretrained(folder)
        again = type(head).from_pretrained(folder)
        config = type(head).load_config(folder)
        expect(config["_class_name"] == name, f"The config names {config['_class_name']!r}; expected {name!r}.")
        expect(
            os.path.isfile(os.path.join(folder, "diffusion_pytorch_model.safetensors")), f"{name} saves no weights."
        )
    with torch.no_grad():
        found = _tensors(again.eval()(**inputs))
    expect(_equal(found, wanted), f"{name} predicts otherwise once it was saved and loaded: is a setting missing "
           "in its config (register_to_config), or a tensor that is neither parameter nor buffer?")  # fmt: skip


def _in_half(head: Head, inputs: Mapping[str, Any], wanted: Tensor) -> None:
    half, name = copy.deepcopy(head).to(torch.bfloat16), type(head).__name__
    try:
        with torch.no_grad():
            found = half(**inputs)
    except RuntimeError as error:
        raise AssertionError(
            f"{name} in bfloat16 does not run ({error}). Features come in float32: make its layers of CastLinear and "
            "the like (diffusers_repr.models.layers), which compute in the dtype of their input."
        ) from error
    expect(found.shape == wanted.shape, f"{name} in bfloat16 gives {tuple(found.shape)}.")
    expect(not bool(found.isnan().any()), f"{name} in bfloat16 gives NaN.")


def _trained(head: Head, inputs: Mapping[str, Any], apart: Sequence[str]) -> None:
    model = copy.deepcopy(head).train()
    if not list(model.parameters()):
        return
    with torch.random.fork_rng(devices=[]):
        torch.stack([one.square().mean() for one in _tensors(model(**inputs))]).sum().backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None and not any(name.startswith(f"{part}.") for part in apart)
    ]
    expect(not silent, f"{type(head).__name__}: no gradient reaches {silent[:5]}.")


def _fitted(head: PooledHead, options: Mapping[str, Any]) -> None:
    """Classes that lie far apart along the axes."""
    assert head.kind is not None
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 3
    features = torch.randn(120, 8, generator=generator) + 6 * torch.eye(8)[labels]
    with leaving_alone(f"Fitting a {type(head).__name__}"):
        result = fit_head(features, labels, head=head.kind, **options)
    found = accuracy_of(result.head, features, labels)
    expect(found > 0.9, f"A fitted {type(head).__name__} tells {found:.0%} of three classes that lie far apart.")
    with torch.no_grad():
        expect_close(result.head(features)[:5], result.head(features[:5]), "Logits of rows alone and among others")


def _fitted_on_maps(head: MapClassifier, options: Mapping[str, Any]) -> None:
    """Classes that lie apart along the channels, wherever in the map."""
    assert head.kind is not None
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    maps = torch.randn(60, 8, 3, 2, generator=generator) + 3 * torch.eye(8)[labels][:, :, None, None]
    quick = PROTOCOLS["adam-maps"].replace(learning_rate=0.02, batch_size=15)  # few images, narrow heads
    given = ("self", "layers", "channels", "sizes", "num_classes", "levels")
    own = [name for name in inspect.signature(type(head).__init__).parameters if name not in given]
    settings = {name: head.config[name] for name in own} | dict(options)  # as wide as the head that came
    with leaving_alone(f"Fitting a {type(head).__name__}"):
        found = fit_map_head({"a": maps}, labels, head=head.kind, protocol=quick, **settings).head
    accuracy = map_accuracy(found, {"a": maps}, labels)
    expect(accuracy > 0.9, f"A fitted {type(head).__name__} tells {accuracy:.0%} of three classes that lie far apart.")
    with torch.no_grad():
        alone, among = found({"a": maps[:5]}), found({"a": maps})[:5]
        expect_close(among, alone, "Logits of images alone and among others")


__all__ = ["check_head"]
