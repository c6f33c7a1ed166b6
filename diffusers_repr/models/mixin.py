"""What the networks and heads of this library share as diffusers models: saving, `AutoModel`, casting."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin, ModelMixin

_PACKAGE = __name__.partition(".")[0]
_FILE = '''"""`{name}` for `diffusers.AutoModel`; the class itself comes with `pip install diffusers-repr`."""

from {package} import {name}

__all__ = ["{name}"]
'''


class ReprModelMixin(ModelMixin, ConfigMixin):
    """Base of this library's models; a class lists it first, before the `ModelMixin` by which pipelines find it.

    Beside config and weights a model of this library saves a file of one import, `auto_file`, which its config names
    in `auto_map`: `diffusers.AutoModel.from_pretrained(folder_or_id, trust_remote_code=True)` then gives the class,
    with consent alone. The class's own `from_pretrained` neither needs nor reads the file.
    """

    @classmethod
    def auto_file(cls) -> tuple[str, str] | None:
        """Name and content of the file by which `diffusers.AutoModel` finds the class.

        Returns:
            None for a class of another package, which can be registered by `register_for_auto_class`.

        Example:
            >>> from diffusers_repr import LinearHead
            >>> LinearHead.auto_file()[0]
            'diffusers_repr_linear.py'
        """
        parts = cls.__module__.split(".")
        if parts[0] != _PACKAGE:
            return None
        room = ".".join(parts[:2])  # its names stay where they are, files in it may move
        public = getattr(sys.modules[room], cls.__name__, None) is cls
        content = _FILE.format(name=cls.__name__, package=room if public else cls.__module__)
        return f"{_PACKAGE}_{parts[-1]}.py", content

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Any:
        """As diffusers', except that a model with saved buffers is not put on disk, where they would not be loaded.

        Args:
            pretrained_model_name_or_path: A folder or a Hub id.
            **kwargs: As in diffusers.

        Raises:
            ValueError: If `device_map` puts a model with saved buffers on disk.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
            buffers = sorted({name for name, _ in model.named_buffers()} & set(model.state_dict()))
            if buffers:
                raise ValueError(
                    f"device_map puts {cls.__name__} on disk, where its buffers ({', '.join(buffers)}) are not "
                    "loaded. It is small: give another device_map, or none."
                )
        return loaded

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """As diffusers', with the file that `auto_map` names.

        Args:
            save_directory: The folder; made if it is not there.
            push_to_hub: Whether to upload it too.
            **kwargs: Of the upload.
        """
        if (file := self.auto_file()) is not None and not os.path.isfile(save_directory):
            os.makedirs(save_directory, exist_ok=True)
            Path(save_directory, file[0]).write_text(file[1], "utf-8")
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON, with `auto_map`, without the place the model was loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        if (file := self.auto_file()) is not None:
            config["auto_map"] = {"AutoModel": f"{file[0].removesuffix('.py')}.{type(self).__name__}"}
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """As diffusers', of all settings that the config holds.

        `auto_map` tells where the class is found and is no setting. diffusers takes arguments that were given by place
        for defaults, and leaves them out of `from_config(model.config)`; here every value of a config counts.
        """
        settings = {k: v for k, v in config_dict.items() if k not in ("auto_map", "_use_default_values")}
        return super().extract_init_dict(settings, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As diffusers', without its warning of modules kept in float32 where there are none."""
        logger = logging.getLogger(ModelMixin.__module__)
        quiet = _NothingKept()
        logger.addFilter(quiet)
        try:
            return super().to(*args, **kwargs)
        finally:
            logger.removeFilter(quiet)


class _NothingKept(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()


__all__ = ["ReprModelMixin"]
