"""Which element of a module's output is the image: one table, by class name, that families add to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# Blocks that return several tensors -> index of the image stream.
_IMAGE_INDEX: dict[str, int] = {
    # (sample,)
    "Transformer2DModel": 0,
    # two-stream attention: (image, text)
    "Attention": 0,
    # a block of transformers' Swin: (sample, attention)
    "SwinLayer": 0,
}


def register_block_output(class_name: str, index: int) -> None:
    """Tell which element of the tuple that blocks of a class return is the image.

    Args:
        class_name: Name of the module's class, e.g. `"JointTransformerBlock"`.
        index: Position in the returned tuple.

    Raises:
        ValueError: If the class is registered already with another index.
    """
    if _IMAGE_INDEX.setdefault(class_name, index) != index:
        raise ValueError(f"{class_name} is registered already, with index {_IMAGE_INDEX[class_name]}.")


def registered_outputs() -> tuple[tuple[str, int], ...]:
    """What is registered so far: names of classes and positions."""
    return tuple(_IMAGE_INDEX.items())


def block_output(module: nn.Module, output: Any, path: str) -> Tensor:
    """The image tensor in what `module` returned.

    Raises:
        TypeError: If it returned no tensor, or several and its class is not registered.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(getattr(output, "sample", None), Tensor):
        return output.sample
    return output[_image_index(module, output, path)]


def replaced_output(module: nn.Module, output: Any, path: str, value: Tensor) -> Any:
    """What `module` returned, with another image tensor in it; `block_output` of it is `value`.

    Args:
        module: The module.
        output: As it returned it; not changed.
        path: Its path, for messages.
        value: The other image.

    Raises:
        TypeError: As `block_output`.
    """
    if isinstance(output, Tensor):
        return value
    if isinstance(getattr(output, "sample", None), Tensor):
        return type(output)(**{**output, "sample": value})
    at = _image_index(module, output, path)
    return type(output)(value if place == at else part for place, part in enumerate(output))


def _image_index(module: nn.Module, output: Any, path: str) -> int:
    if isinstance(output, (tuple, list)):
        if len(output) == 1 and isinstance(output[0], Tensor):
            return 0
        for cls in type(module).__mro__:
            if cls.__name__ in _IMAGE_INDEX:
                return _IMAGE_INDEX[cls.__name__]
    raise TypeError(
        f"Layer {path!r} ({type(module).__name__}) returned {_describe(output)}; which element is the image is not "
        f"known. Tell it once: `diffusers_repr.register_block_output({type(module).__name__!r}, index)`, or read a "
        "layer inside it."
    )


def _describe(output: Any) -> str:
    if isinstance(output, (tuple, list)):
        return f"a {type(output).__name__} of " + ", ".join(type(item).__name__ for item in output)
    return f"a {type(output).__name__}"
