"""What `predict`, `segment predict` and `segment open` share: settings, the images found, and the task loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from diffusers_repr.cli import options
from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.tasks.task import Task

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
T = TypeVar("T", bound="Task")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedTaskSettings:
    """How a saved task is loaded and which images it sees; batch size and prompt are fields of each command's own."""

    images: list[str] = setting(REQUIRED, "image files, or folders that are searched for them")
    json: bool = setting(False, "print JSON lines instead of a table")
    base: str | None = setting(None, "folder or Hub id of the base model; default: the recorded one")
    base_revision: str | None = setting(None, "branch, tag or commit of --base")
    revision: str | None = setting(None, "branch, tag or commit of the task's repository")
    limit: int | None = setting(None, "the first images only, for a quick try; default: all")
    dtype: options.DType = setting("float32", "of the base model, what it computes in")
    device: str | None = setting(None, "cuda, cpu, ...; default: the accelerator, if there is one")
    quiet: bool = setting(False, "no progress bar")

    def __post_init__(self) -> None:
        for name in ("top", "batch_size"):
            value = getattr(self, name, None)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1; got {value}.")


def load_task(kind: type[T], name: str, args: Any, **more: Any) -> T:
    """The task of a folder or Hub id, on the device that was asked for.

    Args:
        kind: Its class.
        name: Folder or Hub id.
        args: `Settings` of the command.
        **more: What else its `from_pretrained` takes.
    """
    import torch

    task = kind.from_pretrained(
        name,
        base=args.base,
        revision=args.revision,
        base_revision=args.base_revision,
        batch_size=args.batch_size,
        dtype=getattr(torch, args.dtype),
        **more,
    )
    return task.to(options.device(args.device))


def image_batches(files: Sequence[Path], batch_size: int) -> Iterator[tuple[slice, list[Any]]]:
    """`(rows, images)` of files, some at a time."""
    from diffusers_repr.data.image_files import read_image

    for start in range(0, len(files), batch_size):
        rows = slice(start, min(start + batch_size, len(files)))
        yield rows, [read_image(file, "The image") for file in files[rows]]


def find_images(paths: Sequence[str]) -> list[Path]:
    """Files, and the image files in folders (in all depths, sorted by path).

    Raises:
        FileNotFoundError: If a path does not exist, or a folder has no image.
    """
    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise FileNotFoundError(f"No image in the folder {name!r}; looked for {', '.join(SUFFIXES)}.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"No file or folder {name!r}.")
    return found
