"""Pipelines of this package by folder and Hub id, where diffusers alone would not load them."""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from diffusers_repr.hub.checked_loading import INDEX, CheckedLoadingMixin, named_components
from diffusers_repr.hub.components import refuse_code
from diffusers_repr.hub.errors import hub_errors
from diffusers_repr.hub.load import load_json_config
from diffusers_repr.hub.local_module import LocalModuleMixin
from diffusers_repr.hub.push import check_pipeline_file
from diffusers_repr.hub.signature_types import SignatureTypesMixin

# Of diffusers' own arguments, those that say where files come from.
_DOWNLOAD_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")


class OwnComponentsMixin(CheckedLoadingMixin, LocalModuleMixin, SignatureTypesMixin):
    """Base, before `DiffusionPipeline`, of a pipeline with components of this package.

    diffusers refuses to download a repository whose `model_index.json` names a class outside of diffusers and
    transformers, even one that is imported already. With this base `from_pretrained("user/name")` loads it as it loads
    a folder.
    """

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download the files of all components.

        Args:
            pretrained_model_name: Hub id.
            **kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`, `trust_remote_code`;
                others are for diffusers' own download and not used.

        Returns:
            The folder in the Hub's cache.

        Raises:
            ValueError: For what is no Hub id, and for code beside a component without consent.
            HubError: If the Hub or the repository cannot be read.
        """
        options = {name: kwargs[name] for name in _DOWNLOAD_ARGUMENTS if kwargs.get(name) is not None}
        revision = kwargs.get("revision")
        with hub_errors("load", pretrained_model_name, revision=revision):
            index = snapshot_download(pretrained_model_name, revision=revision, allow_patterns=[INDEX], **options)
            named = named_components(Path(index, INDEX))
            # A training run leaves more in its folder than the pipeline.
            patterns = [INDEX, *(f"{name}/*" for name in named)]
            folder = snapshot_download(pretrained_model_name, revision=revision, allow_patterns=patterns, **options)
        if not kwargs.get("trust_remote_code"):
            refuse_code(Path(folder), named)
        return folder


def own_pipeline_class(
    folder_or_id: str, revision: str | None = None, token: str | None = None, **where: Any
) -> Any | None:
    """Class of this package that a pipeline folder or Hub id is of, to call `from_pretrained` of.

    Args:
        folder_or_id: With a `model_index.json`.
        revision: Branch, tag or commit on the Hub.
        token: Hub token.
        **where: `cache_dir`, `local_files_only`, as for `load_json_config`.

    Returns:
        The class; None where `model_index.json` names none of ours, so that `DiffusionPipeline` loads it.

    Raises:
        FileNotFoundError, ValueError, HubError: As `load_json_config`.
    """
    name = load_json_config(folder_or_id, "model_index.json", revision, token, **where).get("_class_name")
    return named_pipeline(str(name)) if is_own_pipeline(name) else None


def named_pipeline(name: str) -> Any:
    """The class of a pipeline of this package, or else of diffusers, imported only now.

    Args:
        name: Of the class, as `model_index.json` has it.

    Raises:
        ValueError: If there is none of this name.

    Example:
        >>> named_pipeline("DDPMPipeline").__module__
        'diffusers.pipelines.ddpm.pipeline_ddpm'
    """
    file = _own_pipelines().get(name)
    if file is not None:
        return getattr(importlib.import_module(f"diffusers_repr.pipelines.{file.parent.name}.pipeline"), name)
    diffusers = importlib.import_module("diffusers")
    if not name.endswith("Pipeline") or not hasattr(diffusers, name):
        near = difflib.get_close_matches(name, [*_own_pipelines(), *dir(diffusers)], n=3)
        raise ValueError(f"No pipeline {name!r} in this package or in diffusers. Closest: {near}.")
    return getattr(diffusers, name)


def is_own_pipeline(name: Any) -> bool:
    """Whether a pipeline class of this package has this name.

    Example:
        >>> is_own_pipeline("SiTPipeline"), is_own_pipeline("DDPMPipeline"), is_own_pipeline(["code", "Mine"])
        (True, False, False)
    """
    return isinstance(name, str) and name in _own_pipelines()


@cache
def _own_pipelines() -> dict[str, Path]:
    """Name of each pipeline class of this package -> its file; the files are read, not imported."""
    return {check_pipeline_file(file): file for file in pipeline_files()}


def pipeline_files() -> list[Path]:
    """`pipeline.py` of every pipeline of this package, in a clone and in an installation alike, by name.

    Example:
        >>> [file.parent.name for file in pipeline_files()][0]
        'correspondence'
    """
    package = importlib.import_module("diffusers_repr.pipelines")
    return sorted(Path(package.__path__[0]).glob("*/pipeline.py"))


def scheduler_files() -> list[Path]:
    """The file of every scheduler of this package, by name.

    Example:
        >>> [file.stem for file in scheduler_files()]
        ['scheduling_flow_match_ode', 'scheduling_flow_match_sde', 'scheduling_patch_mask']
    """
    package = importlib.import_module("diffusers_repr.schedulers_ext")
    return sorted(Path(package.__path__[0]).glob("scheduling_*.py"))
