"""A probe as files: the head's config and weights, the recipe, the model card; one folder, one Hub repository."""

from __future__ import annotations

import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusers_repr.denoiser import Denoiser
from diffusers_repr.heads import PooledHead, list_heads
from diffusers_repr.hub import atomic_folder, atomic_write, push_folder, read_json, resolve_folder, write_json
from diffusers_repr.hub.schema import shown
from diffusers_repr.tasks.base import found_base, open_base, written_base
from diffusers_repr.tasks.probe_card import probe_card
from diffusers_repr.tasks.recipe import ProbeRecipe

RECIPE = "probe.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_PATTERNS = ["config.json", RECIPE, "*.safetensors", "*.safetensors.index.json", "README.md"]


def save(head: PooledHead, recipe: ProbeRecipe, folder: str | os.PathLike[str], title: str | None = None) -> None:
    """Write a probe, all or nothing.

    Raises:
        FileExistsError: If the folder holds something that is no probe.
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / RECIPE).is_file():
        raise FileExistsError(
            f"{str(folder)!r} is not empty and holds no probe (no {RECIPE}); saving would replace all of it. Choose "
            "another folder."
        )
    with atomic_folder(target) as fresh:
        recipe = replace(recipe, base=written_base(recipe.base, target))
        _write(head, recipe, fresh, title or Path(os.path.abspath(target)).name)


def _write(head: PooledHead, recipe: ProbeRecipe, folder: Path, title: str) -> None:
    ProbeRecipe.from_dict(recipe.to_dict(), "This probe's recipe")  # what is written can be read
    head.save_pretrained(folder)
    write_json(folder / RECIPE, recipe.to_dict())
    atomic_write(folder / "README.md", probe_card(recipe, type(head).__name__, title))


def load(
    id_or_folder: str | os.PathLike[str],
    base: Any,
    revision: str | None,
    base_revision: str | None,
    token: str | None,
    kwargs: dict[str, Any],
) -> tuple[PooledHead, ProbeRecipe, Denoiser]:
    """Head, recipe and checked base of a probe; the head is read before the base, which may be large."""
    folder = resolve_folder(id_or_folder, revision, token, _PATTERNS)
    recipe = read_probe_recipe(folder)
    recipe = replace(recipe, base=found_base(recipe.base, folder))
    head = read_probe_head(folder)
    values = sum(recipe.base.features.values()) * len(recipe.levels)
    shape = (head.config["in_features"], head.config["num_classes"])
    if shape != (values, len(recipe.label_names)):
        raise ValueError(
            f"The head in {str(folder)!r} takes {shape[0]} values and tells {shape[1]} classes apart; {RECIPE} "
            f"describes {values} values and {len(recipe.label_names)} classes. The files are of two probes."
        )
    return head, recipe, open_base(recipe, folder, base, base_revision, **kwargs)


def read_probe_recipe(folder: Path) -> ProbeRecipe:
    """The recipe in a folder.

    Raises:
        FileNotFoundError: If there is none; tells what the folder seems to be.
        ValueError: If it is damaged.
    """
    path = folder / RECIPE
    if not path.is_file():
        seems = "holds " + (", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing")
        if (folder / "model_index.json").is_file():
            seems = "is a pipeline: pass it as base=..., or fit a probe on it with Probe.fit"
        elif (folder / "manifest.json").is_file():
            seems = "is a store of features"
        raise FileNotFoundError(f"{str(folder)!r} is no probe: it has no {RECIPE}; it {seems}.")
    return ProbeRecipe.from_dict(read_json(path), f"{str(path)!r}")


def read_probe_head(folder: Path) -> PooledHead:
    """The head in a folder; every weight must be there.

    Raises:
        FileNotFoundError: If config or weights are missing.
        ValueError: If they are damaged or do not fit each other.
    """
    config = read_json(folder / "config.json")
    name = config.get("_class_name") if isinstance(config, dict) else None
    classes = {cls.__name__: cls for cls in list_heads(PooledHead).values()}
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"The head in {str(folder)!r} is of class {shown(name)}; known are {', '.join(classes)}. Upgrade "
            "diffusers-repr, import the module that registers the head (`register_head`), or check the folder."
        )
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{str(folder)!r} has no weights ({_WEIGHTS}). Save or download the probe again.")
    try:
        with torch.random.fork_rng(devices=[]):  # making a head may draw weights that are then replaced
            head, info = classes[name].from_pretrained(folder, output_loading_info=True, local_files_only=True)
    except Exception as error:  # safetensors, diffusers and torch each raise their own
        raise ValueError(
            f"The weights or the config in {str(folder)!r} are damaged or do not fit each other "
            f"({type(error).__name__}: {error}). Save or download the probe again."
        ) from error
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise ValueError(
            f"The weights in {str(folder)!r} are not those of its {name}: {wrong}. Save or download the probe again."
        )
    return head.eval()


def push(head: PooledHead, recipe: ProbeRecipe, repo_id: str, **kwargs: Any) -> str:
    """Save to a temporary folder and upload it; warns where others could not find the base."""
    _warn_of_local_base(recipe)
    with tempfile.TemporaryDirectory() as temporary:
        recipe = replace(recipe, base=written_base(recipe.base, None))
        _write(head, recipe, Path(temporary), repo_id)
        return push_folder(temporary, repo_id, kind="probe", **kwargs)


def push_saved(
    folder: str | os.PathLike[str],
    repo_id: str,
    base: str | None = None,
    base_revision: str | None = None,
    **kwargs: Any,
) -> str:
    """Upload a saved probe without loading its base; of its folder, the files of a probe alone.

    Args:
        folder: What `save` wrote; it is not changed.
        repo_id: `"user/name"`.
        base: Hub id to write as the base, where it was a folder.
        base_revision: Goes with `base`.
        **kwargs: For `push_folder`.

    Returns:
        Address of the commit.
    """
    recipe = read_probe_recipe(Path(folder))
    head = read_probe_head(Path(folder))
    if base is not None:
        return push(head, recipe.with_base(base, base_revision), repo_id, **kwargs)
    _warn_of_local_base(recipe)
    return push_folder(folder, repo_id, kind="probe", **kwargs)


def _warn_of_local_base(recipe: ProbeRecipe) -> None:
    if recipe.base.local or recipe.base.name is None:
        warnings.warn(
            f"The probe's base is {recipe.base.name!r}, which is not on the Hub: others must pass base=... when they "
            "load it. Push the base too and give its id: base='user/model'.",
            stacklevel=4,
        )
