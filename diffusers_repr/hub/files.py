"""Files and folders that are either whole or not there: what a kill or a full disk leaves behind is the old state."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

_logger = logging.getLogger(__name__)


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write a file so that a reader sees the old content or the new one, never a part.

    The data goes to a hidden file in the same folder, is flushed to disk, and takes the name in one step. Missing
    parent folders are made.

    Args:
        path: The file to write; an existing file is replaced.
        data: Its content; a string is written as UTF-8.

    Returns:
        `path` as a `Path`.

    Raises:
        IsADirectoryError: If `path` is a folder.
        OSError: If the disk is full or the folder cannot be written; the old file is untouched then.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> atomic_write(folder / "a.txt", "text").read_text()
        'text'
    """
    with atomic_file(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
    return Path(path)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """As `atomic_write`, for a file that is written piece by piece: it takes its name when the block ends well.

    Args:
        path: The file to write; an existing file is replaced.

    Yields:
        The open hidden file.

    Raises:
        IsADirectoryError, OSError: As `atomic_write`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"Cannot write the file {str(path)!r}: a folder has this name. Give a file name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(path, "tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def atomic_files(folder: str | os.PathLike[str], files: Mapping[str, bytes | str]) -> Path:
    """Write several files of one folder so that a full disk leaves all of them as they were.

    Args:
        folder: Made if missing; other files in it stay.
        files: Name -> content; a string is written as UTF-8.

    Returns:
        `folder` as a `Path`.

    Raises:
        OSError: If the disk is full or the folder cannot be written.

    Example:
        >>> folder = atomic_files(getfixture("tmp_path") / "new", {"a.txt": "1", "b.txt": "2"})
        >>> sorted(file.name for file in folder.iterdir())
        ['a.txt', 'b.txt']
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[Path, Path] = {}
    try:
        for name, data in files.items():
            path = folder / name
            if path.is_dir():
                raise IsADirectoryError(f"Cannot write the file {str(path)!r}: a folder has this name.")
            written[path] = _hidden_sibling(path, "tmp")
            with open(written[path], "xb") as file:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in written.items():  # takes no room
            os.replace(temporary, path)
    except BaseException:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise
    _sync_folder(folder)
    return folder


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Fill a folder that takes its name only when the block ends well.

    The block writes into a hidden sibling folder. At its end that folder is renamed to `path`, and an existing
    folder of this name is removed with all it holds. If the block raises, the hidden folder is removed and an
    existing folder stays as it was. A kill at the very moment of the exchange leaves the old folder beside it under
    the hidden name `.<name>.<random>.old`.

    Args:
        path: The folder to make.
        overwrite: False: an existing folder that is not empty is an error.

    Yields:
        The folder to write into.

    Raises:
        FileExistsError: If the folder is not empty and `overwrite` is False.
        NotADirectoryError: If `path` is a file.
        ValueError: If `path` is, or holds, the working directory or the home folder: all of it would be replaced.
        OSError: If the disk is full or the folder cannot be written, whatever the writer inside the block raised.

    Example:
        >>> target = getfixture("tmp_path") / "probe"
        >>> with atomic_folder(target) as folder:
        ...     _ = atomic_write(folder / "config.json", "{}")
        >>> [file.name for file in target.iterdir()]
        ['config.json']
    """
    path = Path(os.path.abspath(path))
    check_replaceable(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _hidden_sibling(path, "tmp")
    temporary.mkdir()
    try:
        yield temporary
        _exchange(temporary, path)
    except SafetensorError as error:  # its writer tells a full disk in words alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


@contextmanager
def only_writer(folder: str | os.PathLike[str], command: str) -> Iterator[None]:
    """Hold a folder against a second run; the system lets go when the process ends, however it ends.

    On a system or file system without locks it does nothing.

    Args:
        folder: Made if it is not there; it keeps the empty hidden file `.extract.tmp`.
        command: What writes, for the message.

    Raises:
        FileExistsError: If another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".extract.tmp", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"Another `{command}` is writing to {str(folder)!r} now. Wait for it, or give another folder (--out)."
            ) from None
        except OSError:
            _logger.debug("no lock on %s", folder)
        yield


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file (UTF-8).

    What is in it is not checked: see `hub/schema.py`.

    Raises:
        FileNotFoundError: If there is no such file; the message names the JSON files beside it.
        ValueError: If the file is not JSON, or larger than 256 MiB, or nested too deeply; the message names file, line
            and column.

    Example:
        >>> read_json(write_json(getfixture("tmp_path") / "a.json", {"seed": 0}))
        {'seed': 0}
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(file.name for file in path.parent.glob("*.json")) if path.parent.is_dir() else []
        hint = f"JSON files in that folder: {', '.join(beside)}" if beside else "that folder has no JSON file"
        raise FileNotFoundError(f"No file {str(path)!r}; {hint}.")
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"The file {str(path)!r} has {size} bytes; a JSON file here has at most {_LARGEST_JSON}.")
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except RecursionError:
        raise ValueError(f"The file {str(path)!r} is nested too deeply. {_CORRUPT}") from None
    except json.JSONDecodeError as error:
        state = "is empty" if not error.doc.strip() else f"is not valid JSON: {error.msg}"
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"The file {str(path)!r} {state} ({where}). {_CORRUPT}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The file {str(path)!r} is not UTF-8 text (byte {error.start}). {_CORRUPT}") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"The file {str(path)!r} cannot be read: {error}. {_CORRUPT}") from error


def write_json(path: str | os.PathLike[str], data: Any, *, indent: int | None = 2) -> Path:
    """Write a JSON file as `atomic_write` does, keys in the order given, with a newline at the end.

    Args:
        path: The file to write.
        data: What JSON can hold: dict, list, tuple, str, int, finite float, bool, None.
        indent: Spaces a level; None for one line.

    Raises:
        TypeError: If `data` holds something JSON cannot (an array, a path, a dtype).
        ValueError: If `data` holds NaN or an infinity, which other JSON readers refuse.
    """
    return atomic_write(path, json_text(data, path, indent))


def json_text(data: Any, path: str | os.PathLike[str], indent: int | None = 2) -> str:
    """What `write_json` writes, with its arguments and errors."""
    try:
        text = json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise TypeError(
            f"Cannot write {str(path)!r}: {error}. JSON holds dict, list, str, int, float, bool and None; turn an "
            "array into a list with `.tolist()`, a path or dtype into a string."
        ) from error
    except ValueError as error:
        raise ValueError(
            f"Cannot write {str(path)!r}: {error}. JSON has no NaN and no infinity; write None for no value."
        ) from error
    return text + "\n"


_LARGEST_JSON = 256 << 20
_CORRUPT = "It may have been cut short or edited: restore it from its source, or delete it and make it again."


def _hidden_sibling(path: Path, kind: str) -> Path:
    """A free hidden name in the same folder; its length does not depend on that of `path`."""
    return path.with_name(f".{path.name[:64]}.{uuid.uuid4().hex[:12]}.{kind}")


def check_replaceable(path: Path, overwrite: bool = True) -> None:
    """Refuse what `atomic_folder` would not replace.

    Args:
        path: An absolute path.
        overwrite: False: an existing folder that is not empty is an error.

    Raises:
        FileExistsError, NotADirectoryError, ValueError: As `atomic_folder`.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"Cannot make the folder {str(path)!r}: a file has this name. Choose another name.")
    for name, kept in (("the working directory", Path.cwd()), ("the home folder", Path.home())):
        if kept == path or path in kept.parents:
            raise ValueError(
                f"{str(path)!r} is or holds {name}, and all of it would be replaced. Name a folder of its own, "
                f"such as {str(path / 'output')!r}."
            )
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"The folder {str(path)!r} is not empty. Choose another name, or allow overwriting.")


def _exchange(new: Path, path: Path) -> None:
    """Give `new` the name `path`; what had the name before is put aside, and removed or put back."""
    if not path.exists():
        os.rename(new, path)
        return
    old = _hidden_sibling(path, "old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def _sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, where the system can open a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
