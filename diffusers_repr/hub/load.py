"""From a local folder or a Hub id to files on this disk."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import filter_repo_objects

from diffusers_repr.hub.errors import HubError, hub_errors, is_repo_id
from diffusers_repr.hub.files import read_json

_LIST_FILES = "`huggingface_hub.list_repo_files` lists what is there."


def resolve_folder(
    id_or_folder: str | os.PathLike[str],
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: str | Sequence[str] | None = None,
    *,
    repo_type: str = "model",
) -> Path:
    """Return the local folder of a model, probe or data set, downloading it if it is a Hub id.

    Args:
        id_or_folder: A local folder, which is returned as it is, or a Hub id (`"user/name"`). A folder goes before
            an id of the same name.
        revision: Branch, tag or commit id on the Hub; None is the main branch.
        token: Hub token; None takes the one of `hf auth login` or HF_TOKEN. It is neither printed nor stored.
        allow_patterns: File name patterns to download (`"*.json"`); None downloads all. Of a local folder nothing is
            left out.
        repo_type: `"model"` or `"dataset"`.

    Returns:
        The folder: the one given, or a snapshot in the Hub's cache (do not write into it).

    Raises:
        FileNotFoundError: If it is a path and there is no such folder.
        NotADirectoryError: If it is a file.
        ValueError: If it is neither a folder nor an id, or a revision is asked of a local folder.
        HubError: If the Hub has no such repository, revision or file, gives no access, or is not reached while the
            cache does not hold it.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> resolve_folder(folder) == folder
        True
    """
    local = _local_folder(id_or_folder, revision)
    if local is not None:
        return local
    repo_id = str(id_or_folder)
    patterns = [allow_patterns] if isinstance(allow_patterns, str) else allow_patterns
    folder = _download(repo_id, repo_type, revision, token, patterns)
    if patterns is not None:
        files = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        if next(iter(filter_repo_objects(files, allow_patterns=list(patterns))), None) is None:
            raise HubError(f"No file in {repo_type} repository {repo_id!r} matches {list(patterns)}. {_LIST_FILES}")
    return folder


def load_json_config(
    id_or_folder: str | os.PathLike[str],
    filename: str = "config.json",
    revision: str | None = None,
    token: str | None = None,
    *,
    repo_type: str = "model",
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> dict[str, Any]:
    """Read one JSON file of a local folder or a Hub repository; nothing else is downloaded.

    Args:
        id_or_folder: A local folder or a Hub id, as in `resolve_folder`.
        filename: Path inside it: `"model_index.json"`, `"unet/config.json"`.
        revision: Branch, tag or commit id on the Hub; None is the main branch.
        token: Hub token; None takes the one of `hf auth login` or HF_TOKEN.
        repo_type: `"model"` or `"dataset"`.
        cache_dir: The Hub's cache, if not the usual one.
        local_files_only: Look in the cache alone.

    Raises:
        FileNotFoundError: If the local folder, or the file in it, does not exist.
        ValueError: If the name is neither folder nor id, or the file is not a JSON object.
        HubError: As in `resolve_folder`, and if the repository has no such file.

    Example:
        >>> folder = getfixture("tmp_path")
        >>> _ = (folder / "config.json").write_text('{"sample_size": 8}')
        >>> load_json_config(folder, "config.json")
        {'sample_size': 8}
    """
    folder = _local_folder(id_or_folder, revision)
    if folder is None:
        repo_id = str(id_or_folder)
        where = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = _download(repo_id, repo_type, revision, token, [glob.escape(filename)], **where)
        if not (folder / filename).is_file():
            seen = " in the cache, and HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
            raise HubError(
                f"{repo_type.capitalize()} repository {repo_id!r} has no file {filename!r} at revision "
                f"{revision or 'main'!r}{seen}. {_LIST_FILES}"
            )
    path = folder / filename
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(
            f"{filename!r} of {str(id_or_folder)!r} holds a JSON {type(config).__name__}; a config is an object "
            "({...}). Check that this is the right file."
        )
    return config


def _download(
    repo_id: str,
    repo_type: str,
    revision: str | None,
    token: str | None,
    patterns: Sequence[str] | None,
    **where: Any,
) -> Path:
    """The snapshot folder in the cache. Without a network this fails at once; `hf_hub_download` would retry first."""
    note = "no local folder has this name"
    with hub_errors("load", repo_id, repo_type=repo_type, revision=revision, note=note):
        folder = snapshot_download(
            repo_id,
            repo_type=repo_type,
            revision=revision,
            token=token,
            allow_patterns=None if patterns is None else list(patterns),
            **where,
        )
    return Path(folder)


def _local_folder(id_or_folder: str | os.PathLike[str], revision: str | None) -> Path | None:
    """The folder if it is one, None if it is a Hub id; everything else raises."""
    name = os.fspath(id_or_folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} was given with the local folder {name!r}, which has no revisions. "
                "Leave it out, or give a Hub id."
            )
        return path
    if path.is_file():
        raise NotADirectoryError(f"{name!r} is a file; a folder or a Hub id ('user/name') is needed.")
    if not isinstance(id_or_folder, str) or path.is_absolute() or name.startswith((".", "~")):
        raise FileNotFoundError(f"There is no folder {name!r}. Check the path, or give a Hub id ('user/name').")
    if not is_repo_id(name):
        raise ValueError(
            f"{name!r} is neither a folder here nor a Hub id. An id is 'name' or 'user/name' of letters, digits, "
            "'-', '_' and '.'. Check the path, or the id."
        )
    return None
