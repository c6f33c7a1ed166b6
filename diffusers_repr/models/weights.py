"""Weights of others, checked: the tensors that the network has, of its shapes and kinds, and every number finite."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusers_repr.hub.components import check_config, check_weight_files
from diffusers_repr.hub.files import read_json
from diffusers_repr.hub.loading_arguments import loading_arguments
from diffusers_repr.hub.schema import printable, shown

_STEM = "diffusion_pytorch_model"
_CAST = ("ignore_mismatched_sizes", "quantization_config")  # with these the file need not hold the network's tensors


class CheckedWeights:
    """Base, before `ModelMixin`, of a network whose config and weights are checked when they are loaded.

    diffusers alone draws missing weights anew, leaves out those it does not know and casts whole numbers, each in
    silence, and takes numbers that are not finite.
    """

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As diffusers' own; a config with sizes that cannot be built is refused.

        Raises:
            ValueError: With the file and the field.
        """
        loader: Any = super()
        loaded = loader.load_config(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        check_config(config, f"config.json of {str(pretrained_model_name_or_path)!r}")
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' own; config and weights are checked.

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            **kwargs: As of diffusers.

        Raises:
            ValueError: For weights that are missing, unknown, of another shape or kind, or not finite; names the file
                and the tensor.
        """
        name, inside = str(pretrained_model_name_or_path), kwargs.get("subfolder") or ""
        cast = any(kwargs.get(key) for key in _CAST)
        local = (Path(name) / inside).is_dir()
        if local and not cast:  # before memory is taken for what the config says
            check_saved(cls, Path(name) / inside, kwargs.get("variant"))
        with_info = kwargs.pop("output_loading_info", False)
        loader: Any = super()
        model, info = loader.from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **loading_arguments(kwargs)
        )
        if not cast:
            folder = None if local else _cached(name, inside, kwargs)
            if folder is not None:
                check_saved(cls, folder, kwargs.get("variant"))
            check_loaded(model, info, name)
        model.check_values()
        return (model, info) if with_info else model

    def check_values(self) -> None:
        """Refuse values that a network of this class cannot work with; called after loading.

        Raises:
            ValueError: With the tensor.
        """


def check_saved(cls: Any, folder: Path, variant: str | None = None) -> None:
    """Check a saved model's files against the class: config, tensors of the safetensors files, and their values.

    Args:
        cls: Of the model.
        folder: With `config.json` and the weights; without safetensors only the config is checked.
        variant: Of the weights' file name.

    Raises:
        ValueError: With the file, and the field or the tensor.
    """
    path = folder / "config.json"
    if not path.is_file():
        return  # the loader says so
    config = check_config(read_json(path), str(path))
    check_weight_files(folder)
    if "quantization_config" in config:
        return
    try:
        expected = build_on_meta(cls, config).state_dict()
    except Exception as error:  # whatever a constructor makes of a config of others
        raise ValueError(
            f"{path}: no {cls.__name__} can be built of it ({type(error).__name__}: {printable(str(error))})."
        ) from error
    files = weight_files(folder, variant)
    if files:
        check_files(files, expected, cls.__name__)


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a model of diffusers; none where there is no such file or one is missing."""
    variant = f".{variant}" if variant else ""
    single, index = folder / f"{_STEM}{variant}.safetensors", folder / f"{_STEM}.safetensors.index{variant}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return files if all(file.is_file() for file in files) else []


def check_files(files: Iterable[Path], expected: Mapping[str, Tensor], name: str) -> None:
    """Check safetensors files against a state dict; one tensor is held at a time.

    Args:
        files: Which together hold the weights.
        expected: Name -> tensor of the shape and kind, on any device.
        name: Of the network, for messages.

    Raises:
        ValueError: With the file and the tensor.
    """
    seen: set[str] = set()
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  no mapping
                    at = f"{str(path)!r}: the tensor {shown(key, 200)}"
                    if key not in expected:
                        raise ValueError(f"{at} is none of {name}; its config and its weights are of two networks.")
                    shape, wanted = tuple(file.get_slice(key).get_shape()), expected[key]
                    if shape != tuple(wanted.shape):
                        raise ValueError(f"{at} is {shape}; {name} with this config has {tuple(wanted.shape)}.")
                    check_tensor(file.get_tensor(key), at, wanted.is_floating_point())
                    seen.add(key)
        except SafetensorError as error:
            raise ValueError(f"{str(path)!r} is no safetensors file, or it is damaged ({error}).") from error
    missing = sorted(set(expected) - seen)
    if missing:
        where = ", ".join(repr(str(path)) for path in files)
        raise ValueError(f"{where}: {len(missing)} weights of {name} are missing, among them {missing[:3]}.")


def check_loaded(model: nn.Module, info: Mapping[str, Any], name: str) -> None:
    """Check a network after loading, for weights in another form than safetensors.

    Raises:
        ValueError: If weights are missing, unknown or of other shapes, or not finite.
    """
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(key)}
    if wrong:
        raise ValueError(f"The weights in {name!r} are not those of its {type(model).__name__}: {wrong}.")
    if not getattr(model, "is_quantized", False):
        check_tensors({key: value for key, value in model.state_dict().items() if not value.is_meta}, repr(name))


def check_tensors(tensors: Mapping[str, Tensor], at: str, *, floating: bool = False) -> None:
    """Check that every number is finite.

    Args:
        tensors: A state dict.
        at: Where it comes from, for messages.
        floating: Refuse whole numbers too.

    Raises:
        ValueError: With the names of the tensors.

    Example:
        >>> check_tensors({"a": torch.ones(2), "b": torch.tensor([0.0, float("nan")])}, "'x.pt'")
        Traceback (most recent call last):
        ...
        ValueError: 'x.pt': the tensor 'b' has 1 of 2 values that are not finite (NaN or infinite)...
    """
    for key, value in tensors.items():
        check_tensor(value, f"{at}: the tensor {shown(key, 200)}", floating or value.is_floating_point())


def check_tensor(value: Tensor, at: str, floating: bool) -> None:
    """Check kind and values of one tensor.

    Raises:
        ValueError: If it is floating or not, unlike `floating`, or not finite.
    """
    if value.is_floating_point() != floating or value.is_complex():
        raise ValueError(f"{at} holds {value.dtype}; {'floating-point' if floating else 'whole'} numbers are needed.")
    if floating:
        value = value if value.dtype.itemsize > 1 else value.float()  # 8 bits have no `isfinite`
        good = torch.isfinite(value)
        if not bool(good.all()):
            raise ValueError(
                f"{at} has {int((~good).sum())} of {value.numel()} values that are not finite (NaN or infinite). The "
                "file is damaged, or its training diverged: take it from its source again, or an earlier checkpoint."
            )


def build_on_meta(cls: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    """A network from its config, without weights."""
    # Not `from_config`: it drops values that were first given by position.
    accepted = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in config.items() if k in accepted and not k.startswith("_")}
    if "_class_name" in config and hasattr(cls, "extract_init_dict"):  # a class may read older configs in its own way
        settings, *_ = cls.extract_init_dict({**settings, "_class_name": config["_class_name"]})
    with torch.device("meta"):
        model = cls(**settings)
    return model.to("meta")


def _cached(name: str, inside: str, kwargs: Mapping[str, Any]) -> Path | None:
    """The folder in the Hub's cache from which a model was loaded."""
    file = f"{inside}/config.json" if inside else "config.json"
    found = try_to_load_from_cache(name, file, cache_dir=kwargs.get("cache_dir"), revision=kwargs.get("revision"))
    return Path(found).parent if isinstance(found, str) else None


__all__ = [
    "CheckedWeights",
    "build_on_meta",
    "check_files",
    "check_loaded",
    "check_saved",
    "check_tensor",
    "check_tensors",
    "weight_files",
]
