"""Layer names: exact full paths; patterns only where they are asked for."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn


def check_layers(model: nn.Module, layers: str | Sequence[str]) -> dict[str, nn.Module]:
    """Modules at exact paths, in the order given.

    Raises:
        TypeError: For an index or anything else that is no path.
        ValueError: For an empty list, a path given twice, or one that does not exist (names the closest).
    """
    paths = [layers] if isinstance(layers, str) else layers
    if isinstance(paths, (int, float)) or not isinstance(paths, Sequence):
        raise TypeError(f"Layers are full module paths such as 'mid_block'; got {layers!r}. `list_layers` shows them.")
    if not paths:
        raise ValueError("No layers: the list is empty. `list_layers(denoiser)` shows what can be read.")
    known = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for path in paths:
        if not isinstance(path, str):
            raise TypeError(
                f"Layer {path!r} is {type(path).__name__}; a layer is named by its full module path, such as "
                "'up_blocks.1', never by an index. `list_layers(denoiser)` shows them."
            )
        if path in found:
            raise ValueError(f"Layer {path!r} is given twice.")
        if path not in known and path.removeprefix("-").isdecimal():
            raise ValueError(
                f"No layer {path!r} in {type(model).__name__}: a layer is named by its full module path, such as "
                f"{list(known)[-1]!r}, never by an index. `list_layers(denoiser)` shows them."
            )
        if path not in known or not path:
            near = difflib.get_close_matches(path, known, n=3, cutoff=0.4)
            raise ValueError(
                f"No layer {path!r} in {type(model).__name__}. Closest: {near or list(known)[1:4]}. "
                "`list_layers(denoiser)` shows all; `match_layers` takes patterns."
            )
        found[path] = known[path]
    return found


def match_layers(model: nn.Module, pattern: str) -> list[str]:
    """Paths that match a shell pattern as a whole, in module order; `*` does not stop at dots.

    Raises:
        TypeError: If `model` is no network, but a `Denoiser` or a pipeline.
        ValueError: If nothing matches.

    Example:
        >>> from torch import nn
        >>> match_layers(nn.Sequential(nn.ReLU(), nn.ReLU()), "*")
        ['0', '1']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"match_layers takes the network, such as `denoiser.model`; got {type(model).__name__}.")
    known = [name for name, _ in model.named_modules() if name]
    found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
        raise ValueError(f"No layer of {type(model).__name__} matches {pattern!r}. Closest: {near or known[:3]}.")
    return found
