"""`from_pretrained` of this package's pipelines, the same over the versions of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers_repr.hub.components import is_component, refuse_code
from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.loading_arguments import loading_arguments

INDEX = "model_index.json"


class CheckedLoadingMixin:
    """Base, before `DiffusionPipeline`, of a pipeline that loads as with the newest diffusers.

    Before 0.38 diffusers runs code that lies beside a component of a local folder without asking, and before 0.40 it
    passes over `dtype`.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers'.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As in diffusers.

        Raises:
            ValueError: If code lies beside a component and `trust_remote_code=True` is not given.
        """
        index = Path(pretrained_model_name_or_path, INDEX)
        if index.is_file() and not kwargs.get("trust_remote_code"):
            refuse_code(index.parent, named_components(index))
        loader: Any = super()
        return loader.from_pretrained(pretrained_model_name_or_path, **loading_arguments(kwargs))


def named_components(index: Path) -> dict[str, Any]:
    """Name -> `[library, class]` of the components that a `model_index.json` names.

    Raises:
        ValueError: If it is no pipeline's index.
    """
    held = read_json(index)
    if not isinstance(held, dict):
        raise ValueError(f"{str(index)!r} is no object; it is no pipeline.")
    return {name: entry for name, entry in held.items() if is_component(entry)}


__all__ = ["INDEX", "CheckedLoadingMixin", "named_components"]
