"""YAML of others as plain values: no tags that make objects, no aliases that grow, no key that stands twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 20
MAX_DEPTH = 50


def parse_yaml(text: str, at: str) -> Any:
    """The value of a YAML text.

    Aliases (`*name`) are refused: a few lines of them can stand for billions of values.

    Args:
        text: Of at most 1 MiB.
        at: Its place, for messages.

    Raises:
        ImportError: Without PyYAML.
        ValueError: For a text that is no YAML, too large or too deep, with aliases, tags that name code, or a key
            twice.

    Example:
        >>> parse_yaml("seed: 1", "recipe.yaml")
        {'seed': 1}
    """
    yaml = import_yaml()
    if len(text.encode()) > MAX_BYTES:
        raise ValueError(f"{at} has {len(text.encode())} bytes; YAML here has at most {MAX_BYTES}.")
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"{at} is nested deeper than {MAX_DEPTH}.")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(
                    f"{at}, line {event.start_mark.line + 1}: the alias *{event.anchor} is not followed; write the "
                    "value out."
                )
        _refuse_double(yaml, yaml.compose(text, yaml.SafeLoader), at)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{at} is no YAML ({' '.join(str(error).split())[:300]}).") from error


def read_yaml(path: Path) -> Any:
    """The value of a YAML file; errors as `parse_yaml`, and those of opening it."""
    return parse_yaml(read_text(path), str(path))


def read_text(path: Path) -> str:
    """The text of a file of at most 1 MiB.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is larger, or not UTF-8.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; YAML here has at most {MAX_BYTES}.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}).") from error


def _refuse_double(yaml: Any, node: Any, at: str) -> None:
    """Of a key that stands twice, PyYAML would keep the last in silence."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"{at}, line {key.start_mark.line + 1}: the key {key.value[:60]!r} stands twice.")
                seen.add(key.value)
            _refuse_double(yaml, value, at)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_double(yaml, item, at)


def import_yaml() -> Any:
    """PyYAML.

    Raises:
        ImportError: Naming the extra.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('Recipes need PyYAML: pip install "diffusers-repr[train]"') from error
    return yaml
