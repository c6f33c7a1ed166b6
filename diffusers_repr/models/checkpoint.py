"""Checkpoints as training scripts write them: read without running code, and what is asked of their tensors."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_repr.hub.components import MAX_DEPTH
from diffusers_repr.hub.schema import shown
from diffusers_repr.models.weights import check_tensors

# Where training scripts keep weights, in the order of preference.
NESTED = ("ema", "model", "state_dict", "model_state_dict")
_WRAPPERS = ("module.", "_orig_mod.")  # of DDP and of torch's compiler, in the names of a state dict


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a checkpoint file holds; no code in it is run, and tensors are mapped from the file where that is possible.

    Args:
        path: A `.safetensors` file, or one written by `torch.save`.

    Raises:
        FileNotFoundError: If there is no such file.
        IsADirectoryError: For a folder.
        ValueError: For a file of another kind, and for one that holds more than tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the checkpoint file in it (.pt or .safetensors).")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        # Training scripts save their arguments along, a plain record.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None:
            raise ValueError(f"{str(path)!r} is no checkpoint of torch, or it is broken.") from error
        raise ValueError(
            f"{str(path)!r} holds pickled Python objects ({found[1].rstrip('.')}), which may run code when they are "
            "loaded; only tensors, plain values and argparse's records are read. Save its weights alone, where you "
            "trust the file: torch.save(checkpoint['ema'], 'weights.pt')."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint of torch, or it is broken ({error}).") from error
    if not isinstance(held, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(held).__name__}, no checkpoint: a dict of tensors is needed.")
    return dict(held)


def select_weights(checkpoint: Mapping[str, Any], which: str | None = None) -> tuple[dict[str, Tensor], str]:
    """The state dict in a checkpoint, without the prefixes that DDP and `torch.compile` put before names.

    Args:
        checkpoint: As read; a state dict, or one that holds some under `ema`, `model`, `state_dict` or
            `model_state_dict`.
        which: One of those names; None takes the first that is there, the average (`ema`) before the trained weights.

    Returns:
        The state dict, and its name in the checkpoint; empty for one that is not nested.

    Raises:
        ValueError: If it is not there, or holds something else than tensors.

    Example:
        >>> select_weights({"ema": {"module.x": torch.ones(1)}, "steps": 3})
        ({'x': tensor([1.])}, 'ema')
    """
    there = [name for name in NESTED if isinstance(checkpoint.get(name), Mapping)]
    if which is not None and which not in there:
        held = ", ".join(map(repr, there)) or f"none of {', '.join(NESTED)}: it is one state dict; leave the name out"
        raise ValueError(f"The checkpoint has no weights {which!r}; it has {held}.")
    name = which or next(iter(there), "")
    weights = checkpoint[name] if name else checkpoint
    wrong = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if wrong or not weights:
        raise ValueError(
            f"The checkpoint has no state dict: it holds {some_of(wrong or ['nothing'])}. Weights are looked for "
            f"under {', '.join(NESTED)}, or at the top."
        )
    return {_bare(key): value for key, value in weights.items()}, name


def check_weights(weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """Refuse tensors that no network of a checkpoint has.

    Args:
        weights: A state dict.
        ranks: Name -> dimensions, of tensors from which sizes are read.

    Raises:
        ValueError: For numbers that are not finite or whole, empty tensors, and other dimensions; names the tensor.
    """
    check_tensors(weights, "The checkpoint", floating=True)
    for key, value in weights.items():
        if not value.numel() or value.ndim != ranks.get(key, value.ndim):
            raise ValueError(f"The checkpoint's tensor {key!r} is {tuple(value.shape)}, which no such network has.")


def check_tensor_names(
    what: str, config: Mapping[str, Any], missing: Sequence[str], unknown: Sequence[str], remark: str = ""
) -> None:
    """Raise ValueError unless the names of a checkpoint's tensors are those of its kind of network.

    Args:
        what: The kind.
        config: `num_layers` and `hidden_size`, as its shapes tell them.
        missing: Names that it lacks.
        unknown: Names that no such network has.
        remark: A further sentence.
    """
    if missing or unknown:
        findings = [f"it lacks {some_of(missing)}"] if missing else []
        findings += [f"it has {some_of(unknown)}, which are unknown"] if unknown else []
        raise ValueError(
            f"This is not quite a checkpoint of {what} ({config['num_layers']} blocks of width "
            f"{config['hidden_size']}): {'; '.join(findings)}.{remark}"
        )


def block_numbers(weights: Iterable[str], stack: str) -> list[int]:
    """Numbers of the blocks `<stack>.<number>.` among names.

    Raises:
        ValueError: For a number beyond what can be built.
    """
    found = [match[1] for key in weights if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", key))]
    far = [number for number in found if len(number) > 6 or int(number) >= MAX_DEPTH]
    if far:
        raise ValueError(f"The checkpoint has a block {shown(far[0])}; allowed are {MAX_DEPTH} blocks.")
    return [int(number) for number in found]


def heads_of(width: int, known: Mapping[int, int]) -> int:
    """Attention heads of a network of some width, by the named sizes of its kind.

    Raises:
        ValueError: For a width of no named size.
    """
    if width not in known:
        sizes = ", ".join(f"{size} ({heads})" for size, heads in known.items())
        raise ValueError(
            f"Shapes do not tell the heads of a network of width {width}; give num_attention_heads. Known widths: "
            f"{sizes}."
        )
    return known[width]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is no safetensors file, or it is broken ({error}).") from error


def _bare(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key[len(next(prefix for prefix in _WRAPPERS if key.startswith(prefix))) :]
    return key


def some_of(names: Iterable[Any], most: int = 6) -> str:
    """The first names of many, for a message."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


__all__ = [
    "NESTED",
    "block_numbers",
    "check_tensor_names",
    "check_weights",
    "heads_of",
    "read_checkpoint",
    "select_weights",
    "some_of",
]
