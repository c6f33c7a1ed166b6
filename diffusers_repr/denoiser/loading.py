"""Opening a pipeline folder of others: no code of theirs runs, and nothing is built before its config is checked."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusers_repr.hub import schema
from diffusers_repr.hub.components import (
    CONSENT,
    OWN_COMPONENTS,
    check_component_files,
    check_config,
    check_index,
    check_weight_files,
)
from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.load import load_json_config
from diffusers_repr.hub.loading_arguments import loading_arguments
from diffusers_repr.hub.own_pipelines import is_own_pipeline, own_pipeline_class

INDEX = "model_index.json"
# Of the loader's own arguments, those that say where `model_index.json` comes from.
_WHERE = ("token", "cache_dir", "local_files_only")


def load_pipeline(id_or_folder: str | Path, revision: str | None, kwargs: Mapping[str, Any]) -> Any:
    """A pipeline of diffusers or of this package.

    Args:
        id_or_folder: Local folder with a `model_index.json`, or Hub id.
        revision: Branch, tag or commit on the Hub.
        kwargs: For `from_pretrained`; with `trust_remote_code=True` the loader of diffusers is on its own.

    Raises:
        FileNotFoundError: If the folder is no pipeline folder.
        ValueError: If a file is damaged, names code that is not of the table, or describes what cannot be built.
        OSError: If the Hub cannot be reached or has no such repository, or a component cannot be read.
    """
    import diffusers

    kwargs = _with_known_dtype(kwargs)
    name, folder = str(id_or_folder), Path(id_or_folder)
    if folder.is_dir():
        check_pipeline_folder(folder)
    elif not folder.is_file() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise FileNotFoundError(f"No folder {name!r}. Pass a pipeline folder or a Hub id 'user/name'.")
    where = {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}
    local = folder.is_dir()
    # Why an id does not load is told at once.
    loader: Any = own_pipeline_class(name, None if local else revision, **where) or diffusers.DiffusionPipeline
    place = name
    if not kwargs.get("trust_remote_code"):
        if not local:
            _check(load_json_config(name, INDEX, revision, **where), f"{INDEX} of {name!r}", kwargs)
            place = str(loader.download(name, revision=revision, **kwargs))
        index = read_json(Path(place) / INDEX)
        check_component_files(Path(place), _check(index, f"{place}/{INDEX}", kwargs))
    try:
        pipe = loader.from_pretrained(place, revision=revision, **loading_arguments(kwargs))
    except (OSError, ImportError) as error:
        raise OSError(
            f"Could not load {name!r}: {' '.join(str(error).split()).rstrip('.')}. A file of a component is missing "
            "or damaged, or did not arrive: save or download the pipeline anew."
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"Could not load {name!r} ({type(error).__name__}: {schema.printable(str(error))}). Its files do not fit "
            "together, or are of another version of diffusers."
        ) from error
    pipe.register_to_config(_name_or_path=name)
    return pipe


def load_autoencoder(
    id_or_folder: str | Path,
    subfolder: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """An autoencoder of diffusers, of the class that its config names.

    Args:
        id_or_folder: Local folder or Hub id.
        subfolder: Where it lies in it; None: at the top.
        revision: Branch, tag or commit on the Hub.
        dtype: Of its weights.

    Raises:
        ValueError: If its config names no network of diffusers or describes what cannot be built, or its weights are
            looked for outside of the folder.
        OSError: If there is no such folder or repository, or a file cannot be read.
    """
    inside = f"{subfolder}/" if subfolder else ""
    at = f"{inside}config.json of {str(id_or_folder)!r}"
    config = check_config(load_json_config(id_or_folder, f"{inside}config.json", revision), at)
    cls = component_class("vae", "diffusers", schema.text(200)(config.get("_class_name"), f"{at}: _class_name"))
    if Path(id_or_folder).is_dir():
        check_weight_files(Path(id_or_folder) / inside)
    return cls.from_pretrained(str(id_or_folder), subfolder=subfolder, revision=revision, torch_dtype=dtype)


def check_pipeline_folder(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline folder.

    Raises:
        FileNotFoundError: If there is none; tells what the folder seems to be.
        ValueError: If it is not JSON.
    """
    index = folder / INDEX
    if not index.is_file():
        inside = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{str(folder)!r} is no pipeline folder: it has no model_index.json (it holds {inside}). "
            "Save one with `pipe.save_pretrained(folder)`."
        )
    return read_json(index)


def component_class(name: str, library: str, class_name: str) -> Any:
    """The class, of a network or scheduler, that a line of `model_index.json` names.

    Args:
        name: Of the component, for messages.
        library: Checked by `check_index`.
        class_name: A public class.

    Raises:
        ValueError: If the library has no such network or scheduler.
    """
    import diffusers

    kinds: tuple[Any, ...]
    if OWN_COMPONENTS.get(class_name) == library:
        return getattr(importlib.import_module(library), class_name)
    if library == "diffusers":
        found = getattr(diffusers, class_name, None)
        kinds = (diffusers.SchedulerMixin if name.endswith("scheduler") else nn.Module,)
    else:
        from transformers import ImageProcessingMixin, PreTrainedTokenizerBase

        home = getattr(diffusers.pipelines, library, None) if library in pipeline_modules() else None
        found, kinds = getattr(home, class_name, None), (nn.Module, PreTrainedTokenizerBase, ImageProcessingMixin)
    if not (inspect.isclass(found) and issubclass(found, kinds) and found.__module__.split(".")[0] == "diffusers"):
        raise ValueError(
            f"{name!r} is a {class_name} of {library!r}, which is no network or scheduler of diffusers "
            f"{diffusers.__version__} or of diffusers-repr. Load the pipeline with diffusers and use "
            "Denoiser.from_pipe(pipe)."
        )
    return found


@cache
def pipeline_modules() -> tuple[str, ...]:
    """Names of the modules of `diffusers.pipelines`, whose classes may be components."""
    import diffusers.pipelines

    return tuple(sorted(module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__)))


def _with_known_dtype(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline's loader with `dtype` by the name that this version of diffusers knows it by."""
    from diffusers.pipelines import pipeline_utils

    # Older loaders take `torch_dtype` and pass over `dtype` without a word. Private: the mark of those that know both.
    if "dtype" in kwargs and not hasattr(pipeline_utils, "_resolve_dtype"):
        return {"torch_dtype" if name == "dtype" else name: value for name, value in kwargs.items()}
    return dict(kwargs)


def _check(index: Any, at: str, given: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The components that a loader would read, of classes that may be built."""
    import diffusers

    components = check_index(index, at, pipeline_modules())
    components = {name: entry for name, entry in components.items() if name not in given}
    for name, (library, class_name) in components.items():
        if library != "transformers":  # whose loader takes its own models, tokenizers and processors alone
            component_class(name, library, class_name)
    pipeline = index.get("_class_name")
    if isinstance(pipeline, (list, tuple)) and "custom_pipeline" not in given:
        raise ValueError(
            f"{at}: _class_name names a pipeline by code that lies beside it; that is not run. Where you trust its "
            f"authors, load it by diffusers with {CONSENT} and pass the pipeline: Denoiser.from_pipe(pipe)."
        )
    known = getattr(diffusers, pipeline, None) if isinstance(pipeline, str) else None
    # Private in diffusers: the one mark of a pipeline that loads what its card names. Without it these are loaded.
    if inspect.isclass(known) and getattr(known, "_load_connected_pipes", False):
        raise ValueError(
            f"{at}: a {pipeline} loads further repositories that its card names; load it by diffusers and pass the "
            "pipeline: Denoiser.from_pipe(pipe)."
        )
    good = inspect.isclass(known) and issubclass(known, diffusers.DiffusionPipeline)
    if not good and not is_own_pipeline(pipeline) and "custom_pipeline" not in given:
        raise ValueError(
            f"{at}: _class_name is {schema.shown(pipeline)}, no pipeline of diffusers {diffusers.__version__} "
            "or of diffusers-repr. Upgrade, or load it by its own code and use Denoiser.from_pipe(pipe)."
        )
    return components


__all__ = [
    "INDEX",
    "check_pipeline_folder",
    "component_class",
    "load_autoencoder",
    "load_pipeline",
    "pipeline_modules",
]
