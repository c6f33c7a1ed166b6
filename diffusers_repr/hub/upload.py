"""The files of an upload, chosen by an allow-list, looked into, and freed of the places of this machine."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers_repr.hub.allowed import AllowList, allowed_names, kind_of
from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.places import last_name, private_places, public_config, without_places
from diffusers_repr.hub.yaml_text import import_yaml, read_yaml

_CONFIGS = (
    "config.json", "model_index.json", "scheduler_config.json", "preprocessor_config.json", "processor_config.json",
    "image_processor_config.json", "generation_config.json", "tokenizer_config.json", "probe.json",
    "segmentation.json", "panoptic.json", "correspondence.json", "manifest.json", "evaluation.json",
)  # fmt: skip
_TEXTS = ("", ".md", ".txt", ".json", ".jsonl", ".yaml", ".py", ".jinja")
_MAGIC = {".png": b"\x89PNG", ".parquet": b"PAR1", ".jpg": b"\xff\xd8", ".jpeg": b"\xff\xd8", ".gif": b"GIF8"}
_TOLD = 12  # names in one line
_SCANNED = 2**20  # bytes of a text that are searched for places


@dataclass(frozen=True)
class UploadFile:
    """One file.

    Attributes:
        path: In the repository.
        source: On this disk.
        size: Bytes that are sent.
        text: What is sent instead of the file's own content; None for that.
    """

    path: str
    source: Path
    size: int
    text: str | None = None


@dataclass(frozen=True)
class Upload:
    """What would be sent.

    Attributes:
        kind: Of the artefact.
        files: In the order of their paths.
        left_out: Files and folders that are not on the kind's list.
    """

    kind: str
    files: tuple[UploadFile, ...]
    left_out: tuple[str, ...]

    def listing(self) -> list[str]:
        """One line a file: size and path; then how many there are."""
        sizes = [_shown_size(file.size) for file in self.files]
        width = max(map(len, sizes), default=0)
        lines = [f"{size:>{width}}  {file.path}" for size, file in zip(sizes, self.files, strict=True)]
        return [*lines, f"{len(lines)} files, {_shown_size(sum(file.size for file in self.files))}"]

    def left_out_line(self) -> str | None:
        """What stays here, in one line; None if nothing does."""
        if not self.left_out:
            return None
        names = ["".join(c if c.isprintable() else "?" for c in name) for name in self.left_out]
        more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
        return f"left out, not on the list of a {self.kind}: {', '.join(names[:_TOLD])}{more}"

    def stage(self, target: Path) -> Path:
        """Lay the files out in an empty folder: links to them where that is possible, and the texts anew."""
        for file in self.files:
            place = target / file.path
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.text is not None:
                place.write_text(file.text, encoding="utf-8", newline="")
                continue
            try:
                os.symlink(os.path.realpath(file.source), place)
            except OSError:  # a system that makes no links
                shutil.copyfile(file.source, place)
        return target


def plan_upload(folder: Path, kind: str | None = None, include: Iterable[str] = ()) -> Upload:
    """Choose and check what of a folder would be sent; nothing is sent, and nothing changed.

    Args:
        folder: The artefact.
        kind: One of `diffusers_repr.hub.allowed.KINDS`; None: what its files tell. With `include` alone (and no
            file that tells) these files are the list.
        include: Further paths; see `push_folder`.

    Raises:
        ValueError: If the folder's kind cannot be told, it has no file to push, a file is not what its name says, is
            a link out of the folder or no plain file, or a text tells where something lies on this machine.
    """
    include = (include,) if isinstance(include, str) else tuple(include)
    listed = _list(folder, kind, include)
    found: list[str] = []
    left_out: list[str] = []
    _collect(folder, "", listed, found, left_out)
    if not found:
        raise ValueError(
            f"The folder {str(folder)!r} has no file to push. Save what is to be pushed first, or name further files "
            "by `include`."
        )
    replaced: dict[str, str] = {}
    files = [_file(folder, path, replaced) for path in sorted(found)]
    files = [_with_card(folder, file, replaced) for file in files]
    return Upload(listed.kind, tuple(files), tuple(sorted(left_out)))


def _list(folder: Path, kind: str | None, include: tuple[str, ...]) -> AllowList:
    if kind is None:
        try:
            kind = kind_of(folder)
        except ValueError:
            if not include:
                raise
            return replace(allowed_names(folder, "model", include), kind="folder", files=("README.md", *include))
    return allowed_names(folder, kind, include)


def _collect(folder: Path, below: str, listed: AllowList, found: list[str], left_out: list[str]) -> None:
    """Walk a folder without following a link; folders that can hold nothing of the list are not entered."""
    with os.scandir(folder / below) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        path = f"{below}/{entry.name}" if below else entry.name
        if listed.left_behind(path):
            continue
        if entry.is_dir(follow_symlinks=False):
            if listed.enters(path):
                _collect(folder, path, listed, found, left_out)
            else:
                left_out.append(path + "/")
        elif not (listed.allows(path) or (listed.enters(path) and entry.is_symlink())):
            left_out.append(path)
        else:
            _check_plain(folder, path, listed)
            found.append(path)


def _check_plain(folder: Path, path: str, listed: AllowList) -> None:
    """Refuse what is no file of this folder: pipes and devices, folders as links, links to what is not listed."""
    place = folder / path
    if place.is_symlink():
        root, target = os.path.realpath(folder), os.path.realpath(place)
        inside = os.path.relpath(target, root).replace(os.sep, "/") if target.startswith(root + os.sep) else None
        if inside is None:
            raise ValueError(
                f"{str(place)!r} is a link to a place outside of the folder; links out of it are not followed. Put "
                "what it leads to in its place (`cp -rL` copies a folder with the files themselves)."
            )
        if os.path.isdir(target) or not listed.allows(inside):
            raise ValueError(
                f"{str(place)!r} is a link to {inside!r}, which is not uploaded itself. Put a file in its place."
            )
    if not stat.S_ISREG(os.stat(place).st_mode):
        raise ValueError(f"{str(place)!r} is no plain file (a pipe, a socket or a device); remove it.")


def _file(folder: Path, path: str, replaced: dict[str, str]) -> UploadFile:
    """One file, looked into: it must be what its name says."""
    source = folder / path
    name, suffix = path.rsplit("/", 1)[-1], source.suffix.lower()
    text = None
    if suffix == ".safetensors":
        _check_safetensors(source)
    elif suffix in _MAGIC:
        with open(source, "rb") as file:
            if not file.read(4).startswith(_MAGIC[suffix]):
                raise ValueError(f"{str(source)!r} is no {suffix[1:]} file, whatever its name says. Remove it.")
    elif suffix == ".json":
        content = read_json(source)
        if name in _CONFIGS:
            text = _public_text(content, replaced)
    elif name == "recipe.yaml":
        text = _public_recipe(source)
    if suffix in _TEXTS and suffix != ".md":
        _refuse_places(folder, source, path, text)
    return UploadFile(path, source, os.stat(source).st_size if text is None else len(text.encode()), text)


def _public_text(content: Any, replaced: dict[str, str]) -> str | None:
    """A config anew if it holds places."""
    seen: dict[str, str] = {}
    base = content.get("base") if isinstance(content, dict) else None
    public = public_config(content, seen)
    if isinstance(base, dict) and base.get("local") is True and isinstance(base.get("name"), str):  # of a probe
        public["base"]["name"] = seen[base["name"]] = last_name(base["name"])
    replaced.update(seen)
    return None if public == content else json.dumps(public, indent=2, ensure_ascii=False) + "\n"


def _public_recipe(source: Path) -> str:
    recipe = without_places(read_yaml(source))
    return import_yaml().safe_dump(recipe, sort_keys=False, width=119)


def _with_card(folder: Path, file: UploadFile, replaced: dict[str, str]) -> UploadFile:
    """Of a card, the text in which the places that the configs held are told by their last names."""
    if not file.path.endswith(".md"):
        return file
    try:
        text = given = file.source.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(file.source)!r} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    for place in sorted(replaced, key=len, reverse=True):
        text = text.replace(place, replaced[place]) if "/" in place or "\\" in place else text
    _refuse_places(folder, file.source, file.path, text)
    return file if text == given else replace(file, text=text, size=len(text.encode()))


def _refuse_places(folder: Path, source: Path, path: str, text: str | None = None) -> None:
    if text is None:
        with open(source, "rb") as file:
            text = file.read(_SCANNED).decode("utf-8", "replace")
    for number, place in private_places(text, folder):
        raise ValueError(
            f"{path}, line {number}, tells where something lies on this machine ({place!r}). Take it out before "
            "others read it."
        )


def _check_safetensors(source: Path) -> None:
    """The header must be one: its length, then JSON."""
    with open(source, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or length > os.stat(source).st_size - 8:
        raise ValueError(f"{str(source)!r} is no safetensors file, whatever its name says. Save it again.")


def _shown_size(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size = size / 1024  # type: ignore[assignment]
    return f"{size} B" if unit == "B" else f"{size:.1f} {unit}"
