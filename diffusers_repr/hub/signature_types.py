"""The types of a pipeline's components, as diffusers reads them off its constructor."""

from __future__ import annotations

import inspect
import types
import typing
from typing import Any


class SignatureTypesMixin:
    """Base, before `DiffusionPipeline`, of a pipeline whose annotations are written as Python writes them today.

    diffusers 0.36 passes over annotations that are text (`from __future__ import annotations`) or of the form
    `X | None`, and then cannot load the pipeline. Later versions read them.
    """

    @classmethod
    def _get_signature_types(cls) -> dict[str, tuple[Any, ...]]:
        # Private in diffusers: `from_pretrained` and `from_pipe` ask it for every argument. If it goes, so may this.
        hints = typing.get_type_hints(cls.__init__)
        return {
            name: _alternatives(hints.get(name, parameter.annotation))
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if name != "self"
        }


def _alternatives(hint: Any) -> tuple[Any, ...]:
    united = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if united else (hint,)
