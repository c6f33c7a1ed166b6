"""Recipes: YAML files and flags into settings dataclasses, for the scripts and for the commands."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from diffusers_repr.hub import schema
from diffusers_repr.hub.yaml_text import import_yaml, read_yaml

REQUIRED = dataclasses.MISSING  # as the default of a setting that must be given


def setting(default: Any, help: str) -> Any:
    """A field of a settings dataclass, with its help text."""
    if isinstance(default, list):
        return HfArg(default_factory=lambda: list(default), help=help)
    return HfArg(default=default, help=help)


def parse_recipe(
    kinds: Sequence[type], argv: Sequence[str], description: str | None = None, **parser_options: Any
) -> tuple[Any, ...]:
    """Settings from the recipe of `--config`, with the command line over it.

    Args:
        kinds: Settings dataclasses with fields of different names; together they are the keys of a recipe. Fields
            that the class attribute `POSITIONAL` names are given without a flag, in that order. Where one has a true
            `OTHER_KEYS`, the recipe may be another command's too, whose keys are passed over. `EARLIER_KEYS` has
            today's names of keys of earlier versions; see `today`. One with a method `refuse_config` is asked first
            whether what `--config` names may be a recipe at all.
        argv: Flags, without the program's name.
        description: For `--help`.
        **parser_options: Of `argparse.ArgumentParser`.

    Returns:
        One object of each kind.

    Raises:
        FileNotFoundError: If there is no such recipe; names those that lie beside it.
        ValueError: For a file that is no mapping, an unknown key or flag (with the closest known ones), or a value of
            another kind than the setting's; see `hub.yaml_text` for the YAML that is read.
        ImportError: If PyYAML is not installed.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", help="YAML recipe; flags win over it")
    known, flags = parser.parse_known_args(list(argv))
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    positional = any(getattr(kind, "POSITIONAL", ()) for kind in kinds)
    flags = _whole_switches(flags, [name for name, hint in hints.items() if hint is bool], words=positional)
    given: list[str] = []
    empty: dict[str, list[Any]] = {}
    if known.config:
        for kind in kinds:
            getattr(kind, "refuse_config", lambda given: None)(known.config)
        recipe = read_recipe(known.config)
        names = [setting.name for kind in kinds for setting in dataclasses.fields(kind)]
        for kind in kinds:
            recipe = today(recipe, getattr(kind, "EARLIER_KEYS", {}), names, str(known.config))
        if any(getattr(kind, "OTHER_KEYS", False) for kind in kinds):
            recipe = {key: value for key, value in recipe.items() if key in names}
        check_keys(known.config, recipe, names)
        for key, value in recipe.items():
            schema.optional(check_of(hints[key]))(value, f"{known.config}: {key}")
            if value == [] and _is_list(hints[key]):  # a flag cannot say it
                empty[key] = []
            elif isinstance(value, list) and _is_list(hints[key]):
                given += [f"--{key}", *(item if isinstance(item, str) else json.dumps(item) for item in value)]
            elif value is not None:  # null leaves the default
                given.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")  # may begin with -
    full = HfArgumentParser(
        cast(Any, list(kinds)), description=description, parents=[parser], allow_abbrev=False, **parser_options
    )
    # argparse lists its flags in this private dict alone; without it an unknown flag is met by argparse's own message.
    _check_flags(flags, list(full._option_string_actions))
    full.set_defaults(**empty)
    if known.config:
        given.append(f"--config={known.config}")  # ends a list of the recipe before what stands without a flag
    for kind in kinds:
        _add_positional(full, kind, [*given, *flags])
    *found, rest = full.parse_args_into_dataclasses(
        [*given, *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise ValueError(_too_many(rest, kinds))
    return tuple(found[: len(kinds)])


def today(recipe: dict[str, Any], earlier: Mapping[str, str], names: Sequence[str], place: str) -> dict[str, Any]:
    """A recipe by today's names of its keys, in their order.

    A key that there no longer is tells that a recipe was written before; then every key has the meaning it had.

    Args:
        recipe: As read.
        earlier: A key of before -> its name today. It may be a key today too, of another meaning.
        names: Today's keys.
        place: Of the recipe, for messages.

    Raises:
        ValueError: If a key stands under both names.

    Example:
        >>> earlier = {"timestep": "timesteps", "dtype": "store_dtype"}
        >>> today({"timestep": 5, "dtype": "float16"}, earlier, ["timesteps", "dtype", "store_dtype"], "recipe.yaml")
        {'timesteps': 5, 'store_dtype': 'float16'}
        >>> today({"timesteps": 5, "dtype": "float16"}, earlier, ["timesteps", "dtype", "store_dtype"], "recipe.yaml")
        {'timesteps': 5, 'dtype': 'float16'}
    """
    gone = [key for key in recipe if key in earlier and key not in names]
    if not gone:
        return recipe
    renamed = [(earlier.get(key, key), key) for key in recipe]
    twice = [pair for pair in renamed if sum(new == pair[0] for new, _ in renamed) > 1]
    if twice:
        (new, one), (_, other) = twice[:2]
        raise ValueError(f"{place} has {one!r} and {other!r}, an earlier name of {new!r}; write today's names.")
    return {new: recipe[key] for new, key in renamed}


def _add_positional(parser: argparse.ArgumentParser, kind: type, given: Sequence[str]) -> None:
    """Declare the positional settings of a kind; their flags stay, unseen, for a recipe to say them by."""
    for name in getattr(kind, "POSITIONAL", ()):
        flag = parser._option_string_actions[f"--{name}"]  # argparse has no public way to an argument it was given
        several, is_given = flag.nargs == "+", any(word.partition("=")[0] == f"--{name}" for word in given)
        nargs = {(False, False): None, (False, True): "?", (True, False): "+", (True, True): "*"}[several, is_given]
        parser.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, type=flag.type or str, help=flag.help)
        flag.required, flag.default, flag.help = False, argparse.SUPPRESS, argparse.SUPPRESS


def _too_many(rest: Sequence[str], kinds: Sequence[type]) -> str:
    names = [name.upper() for kind in kinds for name in getattr(kind, "POSITIONAL", ())]
    takes = f"{' '.join(names)} stand without a flag, together" if names else "all settings are flags, --name value"
    return f"Nothing takes {', '.join(map(repr, rest))}; {takes}. --help lists all."


def _whole_switches(flags: Sequence[str], names: Sequence[str], words: bool) -> list[str]:
    """Flags in which a switch without a value does not take what stands behind it for its value.

    Args:
        flags: As given.
        names: Of the switches.
        words: Whether a single letter or digit behind one is never its value: it may be a folder.
    """
    switches = {f"--{spelled}" for name in names for spelled in (name, name.replace("_", "-"))}
    values = ["yes", "true", "no", "false", *([] if words else "ty1fn0")]  # as `HfArgumentParser` reads them
    behind = [*flags, ""][1:]
    return [
        f"{flag}=true" if flag in switches and after.lower() not in values else flag
        for flag, after in zip(flags, behind, strict=True)
    ]


def _check_flags(flags: Sequence[str], known: Sequence[str]) -> None:
    """Refuse an unknown flag.

    Raises:
        ValueError: Naming the flag and the closest ones.
    """
    before = flags[: flags.index("--")] if "--" in flags else flags  # what follows a bare -- is no flag
    for flag in (token.partition("=")[0] for token in before if token.startswith("--")):
        if flag not in known:
            near = difflib.get_close_matches(
                flag, [one for one in known if "-" in flag[2:] or "-" not in one[2:]], n=3
            )
            hint = f"Closest: {', '.join(near)}." if near else "--help lists all."
            raise ValueError(f"Unknown flag {flag}. {hint}")


_INT, _FLOAT = r"[+-]?\d{1,18}", r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?"
_CHECKS: dict[Any, schema.Check] = {
    bool: schema.boolean(),
    int: schema.either(schema.text(100, pattern=_INT), schema.integer(-(2**63), 2**63)),
    float: schema.either(schema.text(100, pattern=_FLOAT), schema.number()),  # YAML: 1e-3 is a text
    # What is no text goes on as JSON.
    str: schema.either(schema.text(), schema.number(), schema.boolean(), schema.listing(schema.anything())),
    dict: schema.either(schema.text(), schema.mapping(schema.anything())),
}


def check_of(hint: Any) -> schema.Check:
    """The check of a recipe's value by the type of its setting; null, which leaves the default, apart."""
    if get_origin(hint) is Literal:
        return schema.one_of(*get_args(hint))
    if get_origin(hint) is list:
        inner = check_of(get_args(hint)[0])
        return schema.either(inner, schema.listing(inner))
    if hint in _CHECKS:
        return _CHECKS[hint]
    parts = [part for part in get_args(hint) if part is not type(None)]
    if get_origin(hint) is dict or dict in parts or any(get_origin(part) is dict for part in parts):
        return _CHECKS[dict]
    return schema.either(*(check_of(part) for part in parts)) if parts else schema.anything()


def _is_list(hint: Any) -> bool:
    """Whether a setting takes several values in a flag; a list for any other kind is JSON."""
    return any(get_origin(part) is list for part in (hint, *get_args(hint)))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError, ValueError, ImportError: As `parse_recipe`.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"No recipe {str(path)!r}; --config takes a YAML file. In {path.parent}/: {beside}.")
    recipe = read_yaml(path)
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} holds a {type(recipe).__name__}; a recipe is a mapping of key: value.")
    return recipe


def to_yaml(settings: dict[str, Any]) -> str:
    """Settings as a recipe, keys in their order, without YAML's aliases."""
    plain = json.loads(json.dumps(settings))  # no list stands in two places, which YAML would write as an alias
    return import_yaml().safe_dump(plain, sort_keys=False, width=119)


def check_keys(place: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse an unknown key.

    Raises:
        ValueError: Naming the key and the closest allowed ones.
    """
    allowed = [name for name in allowed if name != "self"]
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=3) or sorted(allowed)
            raise ValueError(f"Unknown key {key!r} in {place}. Closest allowed: {near}.")


def take_arguments(config: Any, **targets: Any) -> None:
    """Make settings that hold arguments of a class mappings, and check their names; of a frozen dataclass.

    Args:
        config: The settings.
        **targets: By the name of a setting, the class whose arguments it holds.

    Raises:
        ValueError: For what is no mapping, and for an argument that the class does not have.
    """
    for name, target in targets.items():
        arguments = json_mapping(name, getattr(config, name))
        check_keys(f"`{name}`", arguments, inspect.signature(target.__init__).parameters)
        object.__setattr__(config, name, arguments)


def json_mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A mapping setting, given as such or as JSON on the command line.

    Raises:
        ValueError: If it is none.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value or {}
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(
            f"`{name}` is no JSON ({error}), got {value!r}; a mapping in a flag is like --{name} '{{\"key\": 1}}'."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a mapping (JSON in a flag), got {value!r}.")
    return value
