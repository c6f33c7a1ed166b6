"""Settings that several commands share, and checks of where a command works and writes."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers_repr.config.recipe import setting

if TYPE_CHECKING:
    from diffusers_repr.denoiser import Denoiser
    from diffusers_repr.denoiser.sizes import ImageSize

IMAGE_SIZE = "pixels: one side, or height and width; keep: the images' own; default: the model's size"
DType = Literal["float32", "bfloat16", "float16"]
TEST_FRACTION = (
    "of a data set that is one split: held out to measure the probe on, and left alone by `select`; 0: none"
)
SPLIT_SEED = "of what is held out"
LIMIT = "images of each split, of each class its share, drawn by --split_seed: for a quick try; default: all"
_ROOM = 2**20  # bytes that must be free where a result is to be written


@dataclasses.dataclass(frozen=True)
class Out:
    """What a command writes to `--out`.

    Attributes:
        what: In words.
        marks: Files, one of which a folder holds that may be written to again; none: it must be new or empty.
        replaced: Whether the whole folder is replaced, and not single files in it.
        again: What is done with one that is there, without `--overwrite`: `refused`; `same`: taken where the same
            command made it, by its recipe (`cli/recorded.py`); `resumed`: what writes it looks at it itself.
    """

    what: str
    marks: tuple[str, ...] = ()
    replaced: bool = False
    again: Literal["refused", "same", "resumed"] = "refused"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How a model is loaded and run."""

    dtype: DType = setting("float32", "of the model, what it computes in")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    revision: str | None = setting(None, "branch, tag or commit of the model on the Hub")
    quiet: bool = setting(False, "no progress bar")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """How labelled images are found, conditioned on and resized."""

    image_column: str | None = setting(None, "of the images; default: found by type")
    label_column: str | None = setting(None, "of the class ids; default: found by type")
    prompt: str | None = setting(None, "one for all images; default: the empty one")
    class_label: int | None = setting(
        None, "of class-conditional models, one for all images; default: the null class, if it has one"
    )
    image_size: list[str] | None = setting(None, IMAGE_SIZE)


def two_sides(image_size: Sequence[int] | None) -> tuple[int, int] | None:
    """(H, W) of `--image_size`; None if not given.

    Raises:
        ValueError: For more than two numbers.
    """
    if image_size is None:
        return None
    if len(image_size) > 2:
        raise ValueError(f"--image_size takes one side, or height and width; got {len(image_size)} numbers.")
    return image_size[0], image_size[-1]


def sides(image_size: Sequence[str] | None) -> ImageSize:
    """`image_size` of Python, from an `--image_size` that may be `keep`.

    Raises:
        ValueError: For what is neither one or two whole numbers nor `keep`.
    """
    if image_size is None:
        return None
    if list(image_size) == ["keep"]:
        return "keep"
    if not all(word.isascii() and word.isdigit() for word in image_size):
        raise ValueError(f"--image_size takes one side, or height and width, or keep; got {' '.join(image_size)}.")
    return two_sides([int(word) for word in image_size])


def tell_size(denoiser: Denoiser, image_size: ImageSize, aside: bool = False) -> None:
    """Print the size at which the network sees images, where nobody chose it; aside as in `say`."""
    resize = denoiser.resize_to(image_size)
    if image_size is None and resize is not None:
        size = f"{resize[0]} x {resize[1]} pixels (H x W)"
        say(f"images: {size}, the model's own size; --image_size keep leaves theirs", aside)


def check_limit(limit: int | None) -> None:
    """Refuse a number of images below 1, before anything is loaded.

    Raises:
        ValueError: Names the flag.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is a number of images, at least 1; got {limit}.")


def say(text: str, aside: bool) -> None:
    """Print a line for people: aside, on stderr, where stdout has JSON."""
    print(text, file=sys.stderr if aside else sys.stdout)


def numbers(values: Sequence[float]) -> list[int | float]:
    """Timesteps as given: whole ones as int."""
    return [int(value) if value.is_integer() else value for value in values]


def reading(args: Any, names: Sequence[str]) -> dict[str, Any]:
    """The settings of a `FeatureExtractor` that a command was given: these, levels and image size.

    Args:
        args: `Settings` of the command.
        names: Of settings that have the extractor's names.
    """
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.timesteps is not None:
        steps = numbers(args.timesteps)
        settings["timestep"] = steps if len(steps) > 1 else steps[0]
    if args.image_size is not None:
        settings["image_size"] = sides(args.image_size)
    return settings


def bar(quiet: bool, what: str, unit: str) -> Callable[[int], Any] | None:
    """What makes a progress bar, `progress_bar` of Python's functions; None where none is wanted.

    Args:
        quiet: Whether none is wanted.
        what: Stands before it.
        unit: What is counted.
    """
    from diffusers_repr.store.progress import progress_bar

    return None if quiet else lambda total: progress_bar(total, what, unit)


def device(given: str | None) -> str:
    """The device as given; the accelerator of this machine, or the CPU, if not."""
    import torch

    if given is not None:
        return given
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


def check_out(folder: str, out: Out, overwrite: bool = False) -> None:
    """Refuse a folder that cannot be written, or holds something else, before there is work to lose.

    Args:
        folder: As given.
        out: What the command writes.
        overwrite: Take a folder with an earlier one, whatever `out.again` says.

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
            hint = f" (it has no {' or '.join(out.marks)})" if out.marks else ""
            raise FileExistsError(
                f"--out {folder!r} is not empty and holds no {out.what}{hint}. Name a new folder; what is in this one "
                "stays as it is."
            )
        if not overwrite and out.again == "refused":
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
        hint = (
            f"--out {folder!r}: the disk is full ({free / 1024:.0f} KiB left). Make room, or name a folder elsewhere."
        )
        raise _os_error(errno.ENOSPC, hint)


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
        hint = f"Nothing is lost: the {what} is in {str(kept)!r}; move it from there."
        raise _os_error(first.errno, f"Could not save to {folder!r}: {first.strerror or first}. {hint}") from first
    raise first
