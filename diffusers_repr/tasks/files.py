"""A task as files: the head's config and weights, the recipe, the model card; one folder, one Hub repository."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.features.source import FeatureSource
from diffusers_repr.heads import Head, list_heads
from diffusers_repr.hub import atomic_folder, atomic_write, push_folder, read_json, resolve_folder, write_json
from diffusers_repr.hub.schema import shown
from diffusers_repr.tasks.base import found_base, open_base, written_base
from diffusers_repr.tasks.formats import FORMATS, TaskFormat, format_in
from diffusers_repr.tasks.kept_source import KEPT, PATTERNS, copy_source, keep_source, kept_source

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PATTERNS = ["config.json", "*.safetensors", "*.safetensors.index.json", "README.md"]


def save(
    form: TaskFormat,
    head: Head | None,
    recipe: Any,
    folder: str | os.PathLike[str],
    title: str | None = None,
    source: FeatureSource | None = None,
) -> None:
    """Write a task, all or nothing; with its source, where that is one of `KEPT`.

    Raises:
        FileExistsError: If the folder holds something that is no task of this kind.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / form.file).is_file():
        raise FileExistsError(
            f"{str(folder)!r} is not empty and holds no {form.noun} (no {form.file}); saving would replace all of it. "
            "Choose another folder."
        )
    with atomic_folder(target) as fresh:
        _write(form, head, written_recipe(recipe, target), fresh, title or Path(os.path.abspath(target)).name)
        keep_source(source, fresh)


def written_recipe(recipe: Any, folder: Path | None) -> Any:
    """A recipe as a file holds it; see `written_base`."""
    models: dict[str, Any] = {name: written_base(getattr(recipe, name), folder) for name in recipe.MODELS}
    return replace(recipe, **models)


def _found_recipe(recipe: Any, folder: Path) -> Any:
    models: dict[str, Any] = {name: found_base(getattr(recipe, name), folder) for name in recipe.MODELS}
    return replace(recipe, **models)


def _write(form: TaskFormat, head: Head | None, recipe: Any, folder: Path, title: str) -> None:
    form.recipe.from_dict(recipe.to_dict(), f"This {form.noun}'s recipe")  # what is written can be read
    if head is not None:
        head.save_pretrained(folder)
    write_json(folder / form.file, recipe.to_dict())
    atomic_write(folder / "README.md", form.card(recipe, type(head).__name__, title))


def load(
    form: TaskFormat,
    id_or_folder: str | os.PathLike[str],
    base: Any,
    revision: str | None,
    base_revision: str | None,
    token: str | None,
    kwargs: dict[str, Any],
) -> tuple[Any, Any, Denoiser]:
    """Head (None without one), recipe and checked base of a task; the base, which may be large, is read last."""
    folder = resolve_folder(id_or_folder, revision, token, [*_PATTERNS, form.file])
    recipe = read_recipe(form, folder)
    recipe = _found_recipe(recipe, folder)
    head = read_head(form, folder)
    differs = None if head is None else form.differs(head.config, recipe)
    if differs is not None:
        raise ValueError(f"The head in {str(folder)!r} {differs}. The files are of two {form.noun}s.")
    return head, recipe, open_base(recipe, folder, base, base_revision, head, **kwargs)


def load_source(
    form: TaskFormat,
    id_or_folder: str | os.PathLike[str],
    revision: str | None,
    token: str | None,
    recipe: Any,
    denoiser: Denoiser,
    batch_size: int,
) -> FeatureSource | None:
    """The source that a task's folder holds; None where it holds none."""
    if recipe.foreign not in KEPT:
        return None
    folder = resolve_folder(id_or_folder, revision, token, [form.file, *PATTERNS])
    return kept_source(recipe, folder, denoiser, batch_size)


def read_recipe(form: TaskFormat, folder: Path) -> Any:
    """The recipe in a folder.

    Raises:
        FileNotFoundError: If there is none; tells what the folder seems to be.
        ValueError: If it is damaged.
    """
    path = folder / form.file
    if not path.is_file():
        seems = "holds " + (", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing")
        other = format_in(folder)
        if other is not None:
            seems = f"is {'an' if other.noun[0] in 'aeiou' else 'a'} {other.noun}"
        elif (folder / "model_index.json").is_file():
            seems = f"is a pipeline: pass it as base=..., or fit a {form.noun} on it"
        elif (folder / "manifest.json").is_file():
            seems = "is a store of features"
        raise FileNotFoundError(f"{str(folder)!r} is no {form.noun}: it has no {form.file}; it {seems}.")
    return form.recipe.from_dict(read_json(path), f"{str(path)!r}")


def read_head(form: TaskFormat, folder: Path) -> Head | None:
    """The head in a folder, None where the task has none; every weight must be there.

    Raises:
        FileNotFoundError: If config or weights are missing.
        ValueError: If they are damaged or do not fit each other.
    """
    if form.head is None:
        return None
    config, noun = read_json(folder / "config.json"), form.noun
    name = config.get("_class_name") if isinstance(config, dict) else None
    classes = {cls.__name__: cls for cls in list_heads(form.head).values()}
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"The head in {str(folder)!r} is of class {shown(name)}; known are {', '.join(classes)}. Upgrade "
            "diffusers-repr, import the module that registers the head (`register_head`), or check the folder."
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{str(folder)!r} has no weights ({_WEIGHTS}). Save or download the {noun} again.")
    try:
        with torch.random.fork_rng(devices=[]):  # making a head may draw weights that are then replaced
            head, info = classes[name].from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except Exception as error:  # safetensors, diffusers and torch each raise their own
        raise ValueError(
            f"The weights or the config in {str(folder)!r} are damaged or do not fit each other "
            f"({type(error).__name__}: {error}). Save or download the {noun} again."
        ) from error
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise ValueError(
            f"The weights in {str(folder)!r} are not those of its {name}: {wrong}. Save or download the {noun} again."
        )
    return head.eval()


def push(
    form: TaskFormat,
    head: Head | None,
    recipe: Any,
    repo_id: str,
    keep: Callable[[Path], None] | None = None,
    **kwargs: Any,
) -> str:
    """Save to a temporary folder, to which `keep` adds the source, and upload it; warns of bases not on the Hub."""
    _warn_of_local_models(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        _write(form, head, written_recipe(recipe, None), Path(temporary), repo_id)
        if keep is not None:
            keep(Path(temporary))
        return push_folder(temporary, repo_id, kind=form.noun, **kwargs)


def push_saved(
    folder: str | os.PathLike[str],
    repo_id: str,
    base: str | None = None,
    base_revision: str | None = None,
    clip: str | None = None,
    **kwargs: Any,
) -> str:
    """Upload a saved task without loading its base; of its folder, the files of its kind alone.

    Args:
        folder: What `save` wrote; it is not changed.
        repo_id: `"user/name"`.
        base: Hub id to write as the base, where it was a folder.
        base_revision: Goes with `base`.
        clip: Likewise of a task's CLIP.
        **kwargs: For `push_folder`.

    Returns:
        Address of the commit.
    """
    form = format_in(Path(folder)) or FORMATS["probe"]
    recipe = read_recipe(form, Path(folder))
    head = read_head(form, Path(folder))
    if base is not None:
        recipe = recipe.with_base(base, base_revision)
    if clip is not None:
        if "clip" not in recipe.MODELS:
            raise ValueError(f"clip={clip!r} is for tasks with a CLIP; {str(folder)!r} is a {form.noun}.")
        recipe = recipe.with_clip(clip)
    if base is not None or clip is not None:
        return push(form, head, recipe, repo_id, functools.partial(copy_source, Path(folder)), **kwargs)
    _warn_of_local_models(recipe)
    return push_folder(folder, repo_id, kind=form.noun, **kwargs)


def _warn_of_local_models(recipe: Any) -> None:
    for what in recipe.MODELS:
        record = getattr(recipe, what)
        if record.local or record.name is None:
            warnings.warn(
                f"The {recipe.NOUN}'s {what} is {record.name!r}, which is not on the Hub: others must pass {what}=... "
                f"when they load it. Push the {what} too and give its id: {what}='user/model'.",
                stacklevel=4,
            )


__all__ = ["load", "load_source", "push", "push_saved", "read_head", "read_recipe", "save"]
