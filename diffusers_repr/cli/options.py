"""Options that several commands share."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_ROOM = 2**20  # bytes that must be free where a result is to be written


@dataclass(frozen=True)
class Out:
    """What a command writes to `--out`.

    Attributes:
        what: In words.
        marks: Files, one of which a folder holds that may be written to again; none: it must be new or empty.
        replaced: Whether the whole folder is replaced, and not single files in it.
    """

    what: str
    marks: tuple[str, ...] = ()
    replaced: bool = False


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Declare `--image_size`."""
    parser.add_argument("--image_size", type=int, nargs="+", help="pixels: one side, or height and width")


def add_images(parser: argparse.ArgumentParser) -> None:
    """Declare how labelled images are found, conditioned on and resized."""
    parser.add_argument("--image_column", help="found by type if not given")
    parser.add_argument("--label_column", help="class ids; found by type if not given")
    parser.add_argument("--prompt", help="one for all images")
    parser.add_argument("--class_label", type=int, help="condition of a class-conditional model, one for all images")
    add_image_size(parser)


def image_size(args: argparse.Namespace) -> tuple[int, int] | None:
    """(H, W) as given; None if not.

    Raises:
        ValueError: For more than two numbers.
    """
    given = args.image_size
    if given is None:
        return None
    if len(given) > 2:
        raise ValueError(f"--image_size takes one side, or height and width; got {len(given)} numbers.")
    return given[0], given[-1]


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare `--device`."""
    parser.add_argument("--device", help="cuda, cpu, ...; an accelerator if there is one")


def device(args: argparse.Namespace) -> str:
    """The device as given; the accelerator of this machine, or the CPU, if not."""
    import torch

    if args.device is not None:
        return args.device
    return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"


def check_device(name: str) -> None:
    """Refuse a device that this machine has not, before anything is loaded.

    Raises:
        ValueError: Naming those it has.
    """
    import torch

    here = ["cpu"]
    if torch.accelerator.is_available():
        kind = str(torch.accelerator.current_accelerator())
        here += [kind, *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in [*here, "cpu:0"]:
        raise ValueError(f"--device {name!r} is not on this machine; it has {', '.join(here)}.")


def check_out(folder: str, out: Out, overwrite: bool = True) -> None:
    """Refuse a folder that cannot be written, or holds something else, before there is work to lose.

    Args:
        folder: As given.
        out: What the command writes.
        overwrite: False: only a new or empty folder is taken.

    Raises:
        NotADirectoryError: If it, or a folder above it, is a file.
        FileExistsError: If it holds something that is not of `out`.
        ValueError: If it is empty, or all of the working directory or the home folder would be replaced.
        OSError: If it cannot be written, or the disk is full.
    """
    from diffusers_repr.hub.files import check_replaceable

    if not folder.strip():
        raise ValueError("--out is empty; name a folder.")
    path = Path(os.path.abspath(folder))
    above = path
    while not os.path.lexists(above) and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise NotADirectoryError(f"--out {folder!r}: {str(above)!r} is a file or a dead link; name a folder.")
    if out.replaced:
        check_replaceable(path)
    if path.is_dir() and any(out.replaced or not held.name.startswith(".") for held in path.iterdir()):
        ours = any(any(path.glob(mark)) for mark in out.marks)
        if not ours:
            told = f" (it has no {' or '.join(out.marks)})" if out.marks else ""
            raise FileExistsError(
                f"--out {folder!r} is not empty and holds no {out.what}{told}. Name a new folder; what is in this one "
                "stays as it is."
            )
        if not overwrite:
            raise FileExistsError(f"--out {folder!r} exists already; name another folder, or add --overwrite.")
    _check_writable(folder, above if above != path or not out.replaced else path.parent)


def _check_writable(folder: str, place: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"x" * 4096)
            file.flush()
    except OSError as error:
        raise _os_error(error.errno, f"--out {folder!r} cannot be written: {error.strerror}.") from error
    free = shutil.disk_usage(place).free
    if free < _ROOM:
        told = (
            f"--out {folder!r}: the disk is full ({free / 1024:.0f} KiB left). Make room, or name a folder elsewhere."
        )
        raise _os_error(errno.ENOSPC, told)


def _os_error(number: int | None, text: str) -> OSError:
    """An error of this number whose text is ours alone."""
    error = OSError(text)
    error.errno = number
    return error


def save_or_keep(save: Callable[[Path], object], folder: str, what: str, places: Sequence[str] | None = None) -> None:
    """Save the result of long work; where that fails, save it elsewhere and say where.

    Args:
        save: Writes the result into a folder.
        folder: Where it belongs.
        what: Of the result, for the name of the other folder.
        places: Where else it may lie; the temporary, home and working folder if None.

    Raises:
        OSError: That of the first try; tells where the result is.
    """
    try:
        save(Path(folder))
        return
    except OSError as error:
        first = error
    for root in places or (tempfile.gettempdir(), str(Path.home()), os.getcwd()):
        kept = None
        try:
            kept = Path(tempfile.mkdtemp(prefix=f"diffusers-repr-{what}-", dir=root))
            save(kept)
        except OSError:
            if kept is not None:
                shutil.rmtree(kept, ignore_errors=True)
            continue
        told = f"Nothing is lost: the {what} is in {str(kept)!r}; move it from there."
        raise _os_error(first.errno, f"Could not save to {folder!r}: {first.strerror or first}. {told}") from first
    raise first
