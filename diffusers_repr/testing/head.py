"""`check_head`: is a class of heads ready to be fitted, saved and loaded by its name?"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.heads import Head, MapClassifier, MapHead, PooledHead, fit_head, fit_map_head, list_heads
from diffusers_repr.heads.fitting.fit import accuracy_of
from diffusers_repr.heads.fitting.maps import map_accuracy
from diffusers_repr.testing.checks import expect, expect_close, leaving_alone


def check_head(head: Head, inputs: Mapping[str, Any], *, fits: bool = True, **options: Any) -> None:
    """Hold a head to the contract of heads.

    It must be registered, give float32 in all forms of output, be saved and loaded, give every parameter a gradient;
    a `PooledHead`, a `MapHead` and a `MapClassifier` must run in half precision on float32 features, and the first and
    the last must learn classes that lie apart.

    Args:
        head: One with drawn weights.
        inputs: Arguments of its call by name, float32, for at least two samples.
        fits: Whether to fit a new one of its kind too, where it is a `PooledHead` or a `MapClassifier`.
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
    expect(isinstance(plain, Tensor), f"{name} gives a {type(plain).__name__} by itself; expected the tensor.")
    expect(plain.dtype == torch.float32, f"{name} gives {plain.dtype} of float32; expected torch.float32.")
    expect(not bool((plain.isnan() | (plain == torch.inf)).any()), f"{name} gives NaN or infinity.")
    expect(isinstance(parts, tuple) and len(parts) == 1, f"{name}(..., return_dict=False) is no tuple of one.")
    for form, found in (("return_dict=True", output.to_tuple()[0]), ("return_dict=False", parts[0])):
        expect(torch.equal(found, plain), f"{name}(..., {form}) differs from the call without it.")
    _saved(head, inputs, plain)
    if isinstance(head, (PooledHead, MapHead, MapClassifier)):
        _in_half(head, inputs, plain)
    _trained(head, inputs)
    if fits and isinstance(head, PooledHead):
        _fitted(head, options)
    if fits and isinstance(head, MapClassifier) and head.reads_once:
        _fitted_on_maps(head, options)


def _saved(head: Head, inputs: Mapping[str, Any], wanted: Tensor) -> None:
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
        found = again.eval()(**inputs)
    expect(torch.equal(found, wanted), f"{name} predicts otherwise once it was saved and loaded: is a setting missing "
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


def _trained(head: Head, inputs: Mapping[str, Any]) -> None:
    model = copy.deepcopy(head).train()
    if not list(model.parameters()):
        return
    with torch.random.fork_rng(devices=[]):
        model(**inputs).square().mean().backward()
    silent = [name for name, parameter in model.named_parameters() if parameter.grad is None]
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
    with leaving_alone(f"Fitting a {type(head).__name__}"):
        found = fit_map_head({"a": maps}, labels, head=head.kind, **options).head
    accuracy = map_accuracy(found, {"a": maps}, labels)
    expect(accuracy > 0.9, f"A fitted {type(head).__name__} tells {accuracy:.0%} of three classes that lie far apart.")
    with torch.no_grad():
        alone, among = found({"a": maps[:5]}), found({"a": maps})[:5]
        expect_close(among, alone, "Logits of images alone and among others")


__all__ = ["check_head"]
