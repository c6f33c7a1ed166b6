"""The package as a whole: light to import, lazy, its public names documented, its extras named."""

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_repr

PROBE = """
import json, sys, time
import diffusers
before = set(sys.modules)
start = time.perf_counter()
import diffusers_repr
added = time.perf_counter() - start
print(json.dumps({"seconds": added, "modules": sorted(set(sys.modules) - before)}))
"""


def test_import_is_light():
    out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    measured = json.loads(out.splitlines()[-1])
    assert measured["seconds"] < 0.3
    ours = [name for name in measured["modules"] if name.startswith("diffusers_repr")]
    assert ours == ["diffusers_repr"]


def test_studies_import_the_scripts_above_them_after_naming_their_folder():
    """Python puts a script's own folder on the path, not the one above; the tests have both on it."""
    examples = Path(__file__).parents[1] / "examples"
    scripts, found = {script.stem for script in examples.glob("*.py")}, 0
    for study in examples.glob("studies/*.py"):
        named = False
        for line in ast.parse(study.read_text()).body:
            named |= ast.unparse(line).startswith("sys.path.insert(0, str(")
            names = {name.name for name in line.names} if isinstance(line, ast.Import) else set()
            names |= {line.module} if isinstance(line, ast.ImportFrom) else set()
            assert named or not names & scripts, f"{study.name} imports {names & scripts} too early"
            found += bool(names & scripts)
    assert found > 10


def test_public_names_load_and_are_documented():
    for name in set(diffusers_repr.__all__) - {"__version__"}:
        value = getattr(diffusers_repr, name)
        assert inspect.getdoc(value), name
        assert name in dir(diffusers_repr)
        # A public function named like a subpackage would be hidden by it after the first import.
        assert not inspect.ismodule(value), name


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="Public names: .*Denoiser"):
        diffusers_repr.Denoisr  # noqa: B018


def test_command_lists_its_commands(capsys):
    from diffusers_repr.cli import COMMANDS, command_module, main

    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    for name in COMMANDS:
        module = command_module(name)
        assert dataclasses.is_dataclass(module.Settings)
        assert callable(module.run)
