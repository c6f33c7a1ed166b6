"""`check_assigner`: does a class of assigners keep what training and stores rely on?"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.assign import Assigner, list_assigners
from diffusers_repr.testing.checks import expect, leaving_alone


def check_assigner(assigner: Assigner, features: Tensor, **fitting: Any) -> None:
    """Hold an assigner to the contract of assigners.

    It must be registered, refuse to assign before it is fitted, fit the same twice from one seed, give each row the
    same whatever the others are, give what `gives` says and a null that fits it, and be saved and loaded.

    Args:
        assigner: A new one, not fitted.
        features: `(N, in_features)`, enough for it to be fitted.
        **fitting: What else its `fit` takes: `labels=...`.

    Raises:
        AssertionError: With what was found and what is expected.
    """
    name = type(assigner).__name__
    expect(list_assigners().get(assigner.kind or "") is type(assigner), f"{name} is not registered.")
    try:
        assigner.assign(features[:1])
    except RuntimeError:
        pass
    else:
        raise AssertionError(f"{name} assigns before it is fitted; expected a RuntimeError.")
    with leaving_alone(f"Fitting a {name}"):
        fitted = assigner.fit(features, torch.Generator().manual_seed(0), **fitting)
    expect(fitted is assigner, f"{name}.fit gives not itself.")
    found = assigner.assign(features)
    _check_form(assigner, found, len(features))
    alone = torch.cat([assigner.assign(row[None]) for row in features[:8]])
    expect(torch.equal(alone, found[:8]), f"{name} gives a row otherwise among others.")
    again = type(assigner).from_config(assigner.config)
    told = again.fingerprint() != assigner.fingerprint()
    expect(told, f"{name}.fingerprint() does not tell a fitted one from a new one; stores go on by it.")
    again.fit(features, torch.Generator().manual_seed(0), **fitting)
    expect(torch.equal(again.assign(features), found), f"{name} fitted again from one seed assigns otherwise.")
    with tempfile.TemporaryDirectory() as folder:
        assigner.save_pretrained(folder)
        loaded = type(assigner).from_pretrained(folder)
    expect(torch.equal(loaded.assign(features), found), f"{name} assigns otherwise once saved and loaded.")
    expect(torch.equal(loaded.null, assigner.null), f"{name}.null is another once saved and loaded.")
    expect(loaded.fingerprint() == assigner.fingerprint(), f"{name}.fingerprint() is another once saved and loaded.")


def _check_form(assigner: Assigner, found: Tensor, rows: int) -> None:
    name, null = type(assigner).__name__, assigner.null
    expect(len(found) == rows, f"{name} gives {len(found)} conditions of {rows} features.")
    if assigner.gives == "class":
        expect(found.dtype == torch.int64 and found.ndim == 1, f"{name} gives {found.dtype} {tuple(found.shape)}.")
        expect(bool((found >= 0).all()), f"{name} gives ids below 0.")
        known = bool((found < null).all())
        expect(null.ndim == 0 and known, f"{name}.null is {null}; expected an id beyond all classes.")
    elif assigner.gives == "vector":
        expect(found.dtype == torch.float32 and found.ndim == 2, f"{name} gives {found.dtype} {tuple(found.shape)}.")
        expect(null.shape == found.shape[1:], f"{name}.null is {tuple(null.shape)} beside {tuple(found.shape)}.")
        expect(bool(found.isfinite().all()), f"{name} gives vectors that are not finite.")
    else:
        expect(found.dtype == torch.int64 and found.ndim == 2, f"{name} gives {found.dtype} {tuple(found.shape)}.")
        expect(bool(((found >= 0) & (found < rows)).all()), f"{name} gives neighbours that are no rows.")


__all__ = ["check_assigner"]
