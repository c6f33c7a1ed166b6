"""Checkpoints: whole or not there, checked when read; a damaged newest one gives way to the one before it."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusers_repr.hub import atomic_folder, read_json, write_json
from diffusers_repr.hub.identity import file_hash
from diffusers_repr.hub.schema import anything, file_name, inside, integer, mapping, number, optional, record, text
from diffusers_repr.models.weights import check_tensor

_STEPS = integer(0, 10**12)
_SCHEMA = record(
    {
        "step": _STEPS,
        "identity": mapping(anything()),
        "files": mapping(record({"bytes": integer(0, 2**50), "sha256": text(64)}), keys=file_name(".safetensors")),
        "checksum": text(64),
    },
    {
        "progress": record(
            {"step": _STEPS, "skipped": _STEPS, "skipped_in_a_row": _STEPS},
            {"sums": mapping(number()), "counts": mapping(_STEPS)},
        ),
        "ema_updates": _STEPS,
        "scaler": mapping(number()),
        "streams": optional(anything()),
    },
    others=True,
)
STATE = "state.json"
_NAME = re.compile(r"checkpoint-\d+")


class CheckpointError(RuntimeError):
    """A checkpoint that is incomplete, damaged or of another run."""


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first; half-written ones have a hidden name and are not among them."""
    found = [path for path in Path(folder).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done, by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def drop_partial(folder: str | Path) -> None:
    """Remove what killed runs left of checkpoints they had not finished."""
    for path in Path(folder).glob(".checkpoint-*"):
        if path.suffix in (".tmp", ".old"):
            shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    output_dir: str | Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write `checkpoint-<step>` by renaming a finished folder, then drop the oldest ones.

    Checkpoints of later steps, damaged ones or those of a run that was set back, stay and do not count.

    Args:
        output_dir: Folder of the run.
        step: Optimizer steps done.
        tensors: File name without ending -> tensors on the CPU by name; each becomes a safetensors file.
        state: JSON; the checksums of the files are added to it.
        keep: How many of the newest checkpoints stay.

    Returns:
        The new checkpoint.

    Raises:
        OSError: If the disk is full or cannot be written; older checkpoints are untouched.
    """
    final = Path(output_dir) / f"checkpoint-{step:08d}"
    try:
        with atomic_folder(final) as folder:
            for name, group in tensors.items():
                save_file(dict(group), folder / f"{name}.safetensors")
            files = {path.name: _fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}
            content = {**state, "step": step, "files": files}
            write_json(folder / STATE, {**content, "checksum": _checksum(content)})
    except (OSError, SafetensorError) as error:
        left = list_checkpoints(output_dir)
        kept = f"The last checkpoint is {left[-1].name}" if left else "There is no earlier checkpoint"
        raise OSError(
            f"Could not write {final}: {error}. {kept}; free some space and run the same command again."
        ) from error
    for old in [path for path in list_checkpoints(output_dir) if step_of(path) <= step][:-keep]:
        shutil.rmtree(old)
    return final


def find_checkpoint(output_dir: str | Path, resume: str, identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from.

    Args:
        output_dir: Folder of the run.
        resume: `latest`, the name of a checkpoint in it, or `none`.
        identity: What decides the weights; a checkpoint with another one is refused.

    Returns:
        None for a run that starts anew.

    Raises:
        ValueError: For a checkpoint of another run, a name that is not there, or `none` where there are checkpoints.
        CheckpointError: If there are checkpoints and all are damaged.
    """
    existing = list_checkpoints(output_dir)
    if resume not in ("latest", "none"):
        chosen = Path(output_dir) / Path(resume).name
        if chosen not in existing:
            raise ValueError(f"No checkpoint {resume!r} in {output_dir}; there are {[p.name for p in existing]}.")
        _check_whole(chosen)
        _check_identity(chosen, identity)
        return chosen
    if not existing:
        return None
    if resume == "none":
        raise ValueError(f"{output_dir} holds checkpoints; to start anew, name another --output_dir.")
    damage = []
    for path in reversed(existing):
        try:
            _check_whole(path)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        _check_identity(path, identity)
        if damage:
            warnings.warn(f"{' '.join(damage)} Going on from {path.name}.", stacklevel=2)
        return path
    raise CheckpointError(
        f"No checkpoint in {output_dir} is whole: {' '.join(damage)} Delete them to start anew, or restore one."
    )


def read_state(path: Path) -> dict[str, Any]:
    """The checked JSON state of a checkpoint, as it is written.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it says what cannot be; names file and field.
    """
    at = str(path / STATE)
    state = read_json(path / STATE)
    _SCHEMA(anything(finite=True)(state, at), at)
    return state


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """One of its files, on the CPU.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        return load_file(inside(path, f"{name}.safetensors"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} is damaged: {name}.safetensors cannot be read ({error}).") from error


def check_same_tensors(path: Path, name: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse a file of a checkpoint whose tensors are not those of the run, before one of them is taken over.

    Raises:
        CheckpointError: Naming file and tensor.
    """
    other = sorted(set(found) ^ set(wanted))
    if other:
        side = "stands, which this run has not" if other[0] in found else "is missing"
        raise CheckpointError(f"{path.name} is of another run or damaged: in {name}.safetensors {other[0]!r} {side}.")
    for key, value in found.items():
        if value.shape != wanted[key].shape:
            raise CheckpointError(
                f"{path.name} is of another run or damaged: {key!r} in {name}.safetensors has shape "
                f"{tuple(value.shape)}, here it is {tuple(wanted[key].shape)}."
            )
        try:
            check_tensor(value, f"{key!r} in {name}.safetensors", wanted[key].is_floating_point())
        except ValueError as error:
            raise CheckpointError(f"{path.name} is of another run or damaged: {error}") from error


def _check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    before = read_state(path)["identity"]
    current = json.loads(json.dumps(identity))
    then, now = _differing(before, current)
    if then != now:
        raise ValueError(f"{path} is of a run with {then}. Run with these (now: {now}), or name another --output_dir.")


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of two mappings is not equal, down to the innermost keys; None for what one of them lacks."""
    then: dict[str, Any] = {}
    now: dict[str, Any] = {}
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if a == b and (key in old) == (key in new):
            continue
        both = isinstance(a, Mapping) and isinstance(b, Mapping)
        then[key], now[key] = _differing(a, b) if both else (a, b)  # type: ignore[arg-type]
    return then, now


def _check_whole(path: Path) -> None:
    try:
        state = read_state(path)
        files, checksum = state["files"], state.pop("checksum")
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path.name} is damaged: its {STATE} cannot be read ({error})") from error
    if _checksum(state) != checksum:
        raise CheckpointError(f"{path.name} is damaged: {STATE} has not the content that was written.")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path.name} is damaged: {name} is missing.")
        try:
            inside(path, name)
        except ValueError as error:
            raise CheckpointError(f"{path.name} is refused: {error}") from error
        if file.stat().st_size != expected["bytes"] or _fingerprint(file) != expected:
            raise CheckpointError(f"{path.name} is damaged: {name} has not the content that was written.")


def _checksum(state: Mapping[str, Any]) -> str:
    """Of what JSON makes of a state."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(state)), sort_keys=True).encode()).hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}
