"""What a set is made of, in one hash of files: a set that is there already is known without a model being loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from diffusers_repr.config.recipe import json_mapping
from diffusers_repr.data.digits import DIGITS
from diffusers_repr.encoders.loading import split_layer
from diffusers_repr.hub.checked_loading import INDEX, named_components
from diffusers_repr.hub.errors import HubError, hub_errors, is_commit_sha, is_repo_id
from diffusers_repr.hub.identity import file_hash, plain_hash
from diffusers_repr.hub.places import last_name
from diffusers_repr.store.image_store import ImageStore, is_image_store
from diffusers_repr.synthesis.named_guidance import GUIDANCES
from diffusers_repr.synthesis.recipe import GenerationRecipe

# Setting that names a place -> the one with its revision on the Hub.
_PLACES = {
    "model": "revision",
    "dataset_name": "dataset_revision",
    "controlnet": "controlnet_revision",
    "prompts": None,
    "encoder": None,
    "assigner": None,
}


def sources_hash(recipe: GenerationRecipe) -> str | None:
    """A hash of a recipe, of the bytes of all files that it names, and of the version of this library.

    Of a repository on the Hub its commit counts, which is asked for unless the recipe names it.

    Args:
        recipe: It.

    Returns:
        None if not all of it can be told: there is no such folder, or the Hub is not reached.
    """
    settings, found = dataclasses.asdict(recipe), []
    try:
        for name, revision in _PLACES.items():
            if settings[name] is not None:
                kind = "dataset" if name == "dataset_name" else "model"
                given, *layer = split_layer(settings[name]) or [settings[name]]
                found.append([name, *layer, _of_place(given, kind, revision and settings[revision])])
        guidance = json_mapping("guidance", recipe.guidance)
        found += [[at, _of_place(place, "model", None)] for at, place in _of_guidance(guidance)]
    except (OSError, ValueError):
        return None
    # Where files lie on this machine decides nothing.
    told = {key: value for key, value in settings.items() if key not in _PLACES and key != "guidance"}
    named = {name: _without_parts(name, value) for name, value in guidance.items()}
    called = [
        name and (last_name(name) if os.path.isdir(name) else name) for name in (recipe.model, recipe.dataset_name)
    ]
    return plain_hash([told, named, called, found, version("diffusers-repr")])


def made_already(out: str | os.PathLike[str], sources: str | None) -> ImageStore | None:
    """The store in a folder if it is whole and of these sources; every file of it is read against its checksums.

    Args:
        out: The folder.
        sources: Of `sources_hash`.
    """
    if sources is None or not is_image_store(Path(out)):
        return None
    try:
        store = ImageStore.open(out)
        if store.manifest["about"].get("sources") != sources:
            return None
        store.verify()
    except (OSError, ValueError):  # what is not finished or not whole is for `write_images`
        return None
    return store


def _of_place(name: str, kind: str, revision: str | None) -> list[Any]:
    path = Path(name).expanduser()
    if path.is_dir():
        return [[file.relative_to(path).as_posix(), file_hash(file)] for file in _files(path)]
    if path.is_file():
        return [file_hash(path)]
    if kind == "dataset" and name == DIGITS:
        return [name, version("scikit-learn")]
    if not is_repo_id(name):
        raise FileNotFoundError(name)
    return [name, revision if is_commit_sha(revision) else _commit(name, kind, revision)]


def _files(folder: Path) -> Iterator[Path]:
    """Of a pipeline its index and its components; of anything else all, in order, but for what a run leaves beside."""
    tops = sorted(folder.iterdir())
    if (folder / INDEX).is_file():
        named = named_components(folder / INDEX)
        tops = [top for top in tops if top.suffix == ".json" or top.name in named]
    for top in tops:
        if top.name.startswith((".", "checkpoint-")):
            continue
        yield from [top] if top.is_file() else (file for file in sorted(top.rglob("*")) if file.is_file())


def _commit(repo_id: str, kind: str, revision: str | None) -> str:
    with hub_errors("read", repo_id, repo_type=kind, revision=revision):
        sha = (
            HfApi(library_name="diffusers-repr").repo_info(repo_id, repo_type=kind, revision=revision, timeout=10).sha
        )
    if sha is None:
        raise HubError(f"{repo_id!r} has no commit.")
    return sha


def _of_guidance(guidance: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The folders and pictures that guidances name, with where."""
    for name, value in guidance.items():
        for key in GUIDANCES[name].parts if isinstance(value, Mapping) else ():
            given = value.get(key)
            if isinstance(given, str):
                yield f"{name}.{key}", given
            for number, part in enumerate(given if isinstance(given, list) else ()):
                yield from ((f"{number}.{at}", place) for at, place in _of_guidance({"ReadoutGuidance": part}))


def _without_parts(name: str, value: Any) -> Any:
    """A guidance's settings without what `_of_guidance` tells."""
    if not isinstance(value, Mapping):
        return value
    kept = {}
    for key, given in value.items():
        if key not in GUIDANCES[name].parts:
            kept[key] = given
        elif isinstance(given, list):
            kept[key] = [_without_parts("ReadoutGuidance", part) for part in given]
    return kept


__all__ = ["made_already", "sources_hash"]
