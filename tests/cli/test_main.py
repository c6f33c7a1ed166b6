"""The command itself: version, warnings, pipes that close, errors shown in full."""

import logging
import os
import re
import sys
import warnings

import datasets
import pytest
from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers

from diffusers_repr import __version__
from diffusers_repr.cli import COMMANDS, layers, main
from diffusers_repr.cli.guard import run_script
from diffusers_repr.cli.library_output import bars
from diffusers_repr.cli.words import as_typed
from tests.testers.models import saved


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"diffusers-repr {__version__}\n"


def test_traceback_on_request(tmp_path, capsys):
    assert main(["layers", str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["layers", str(tmp_path), "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "FileNotFoundError" in told
    assert told.splitlines()[-1].startswith("diffusers-repr layers: ")


def test_a_reader_that_has_seen_enough(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["layers", str(saved("ddpm"))]) == 0
    assert "roken pipe" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [(ValueError("one\n  two"), 2, "one two"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_one_line(monkeypatch, capsys, raised, code, told):
    def run(args):
        raise raised

    monkeypatch.setattr(layers, "run", run)
    assert main(["layers", "model"]) == code
    assert capsys.readouterr().err == f"diffusers-repr layers: {told}\n"


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (ValueError("one\n  two"), 2, "one two"),
        (KeyError("x"), 1, "not foreseen: KeyError: 'x'. Please report it; --debug shows where it arose."),
        (MemoryError(), 1, "out of memory. Try a smaller --train_batch_size, --gradient_checkpointing, or "
                           "--mixed_precision bf16."),
        (None, 0, ""),
    ],
)  # fmt: skip
def test_scripts_answer_as_commands_do(monkeypatch, capsys, raised, code, told):
    def script(argv):
        assert argv == ["--seed", "1"]
        warnings.warn("mind this", stacklevel=2)
        if raised is not None:
            raise raised

    monkeypatch.setattr(sys, "argv", ["examples/train_it.py", "--seed", "1", *(["--debug"] if code == 2 else [])])
    monkeypatch.setattr(warnings, "showwarning", lambda *what: print(warnings.formatwarning(*what), end=""))
    monkeypatch.setattr(warnings, "filters", [("always", None, Warning, None, 0)])
    with pytest.raises(SystemExit) as stopped:
        run_script(script)
    printed = capsys.readouterr()
    assert stopped.value.code == code
    assert printed.err.splitlines()[-1:] == ([f"train_it.py: {told}"] if told else [])
    assert ("Traceback" in printed.err) == (code == 2)
    assert printed.out == "train_it.py: warning: mind this\n"


def test_warnings_are_one_line(monkeypatch):
    def run(args):
        shown.append(warnings.formatwarning("mind this", UserWarning, "file.py", 3, "code"))
        shown.append(warnings.formatwarning("gone soon", FutureWarning, "file.py", 3, "code"))
        return 0

    shown = []
    usual = warnings.formatwarning
    monkeypatch.setattr(layers, "run", run)
    assert main(["layers", "model"]) == 0
    assert shown == ["diffusers-repr layers: warning: mind this\n", "file.py:3: FutureWarning: gone soon\n  code\n"]
    assert warnings.formatwarning is usual


def test_help_tells_every_default(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert "default: None" not in told
        assert "default: []" not in told
    settings = {"probe": ["--test_fraction", "(default: 0.2)"], "select": ["--noise", "(default: per_image)"]}
    for command, (flag, default) in settings.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        told = " ".join(capsys.readouterr().out.split("options:")[1].split())
        assert re.search(rf"{flag} .{{0,300}}{re.escape(default)}", told)
        assert re.search(r"--out OUT .{0,80}\(required\)", told)


def test_what_must_be_given_is_told_in_two_lines(capsys):
    with pytest.raises(SystemExit):
        main(["probe", "MODEL", "DATA"])
    assert capsys.readouterr().err.splitlines() == [
        "usage: diffusers-repr probe MODEL DATASET --out OUT [--config RECIPE.yaml] [--SETTING VALUE ...] [--help]",
        "diffusers-repr probe: error: the following arguments are required: --out",
    ]


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("pass image_size=(H, W) to resize", "pass --image_size H W to resize"),
        ("Pass it as base=..., or fit anew.", "Pass it as --base BASE, or fit anew."),
        ("base=<folder, Hub id> with the same", "--base <folder, Hub id> with the same"),
        ("noise='fresh' goes on; use timestep=[1, 2].", "--noise fresh goes on; use --timesteps 1 2."),
        ("ensemble_size must be 1", "--ensemble_size must be 1"),
        ("drop class_labels.", "drop --class_label."),
        ("pass image_size (--image_size) to", "pass --image_size to"),
        ("`list_layers(denoiser)` shows all", "`diffusers-repr layers MODEL` shows all"),
        ("the noise of base and seed", "the noise of base and seed"),  # words of the language
        ("/data/image_size/base=3.png", "/data/image_size/base=3.png"),
        ("data.image_size: 8 -> 16", "data.image_size: 8 -> 16"),
        ("'ensemble_size' is no key", "'ensemble_size' is no key"),
    ],
)
def test_messages_in_the_words_of_a_command(said, typed):
    assert (
        as_typed(said, ("image_size", "base", "noise", "timesteps", "ensemble_size", "class_label", "seed")) == typed
    )


def test_errors_and_warnings_of_a_command_name_its_flags(monkeypatch, capsys):
    def run(args):
        warnings.warn("Set image_size=16.", stacklevel=1)
        raise ValueError("No layer 'mid'; pass image_size=(H, W). `list_layers(denoiser)` shows all.")

    monkeypatch.setattr(layers, "run", run)
    with pytest.warns(UserWarning, match="image_size"):
        assert main(["layers", "model"]) == 2
    told = "diffusers-repr layers: No layer 'mid'; pass --image_size H W. `diffusers-repr layers MODEL` shows all.\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("flags", "variable", "shown"), [([], None, False), (["--verbose"], None, True), ([], "info", True)]
)
def test_log_lines_of_other_libraries(monkeypatch, capfd, flags, variable, shown):
    names = {"diffusers": "DIFFUSERS_VERBOSITY", "transformers": "TRANSFORMERS_VERBOSITY"}
    for name, setting in names.items():
        monkeypatch.delenv(setting, raising=False)
        if variable is not None:
            monkeypatch.setenv(setting, variable)
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    seen = []

    class Keep(logging.Handler):
        def emit(self, record):
            seen.append((record.name.split(".")[0], record.levelname))

    def run(args):
        for name in names:
            logging.getLogger(f"{name}.loading").warning("a report on keys")
            logging.getLogger(f"{name}.loading").error("an error")
        return 0

    keep = Keep()
    logging.getLogger().addHandler(keep)
    try:
        monkeypatch.setattr(layers, "run", run)
        assert main(["layers", "model", *flags]) == 0
    finally:
        logging.getLogger().removeHandler(keep)
    kinds = ["WARNING", "ERROR"] if shown else ["ERROR"]
    assert seen == [(name, kind) for name in names for kind in kinds]
    assert {logging.getLogger(name).level for name in names} == {logging.WARNING}
    assert [os.environ.get(setting) for setting in names.values()] == [variable, variable]


@pytest.mark.parametrize(
    ("terminal", "given", "moving"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bars_of_other_libraries_move_on_a_terminal_alone(monkeypatch, terminal, given, moving):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    asked = [of_diffusers.is_progress_bar_enabled, of_transformers.is_progress_bar_enabled,
             lambda: not datasets.are_progress_bars_disabled()]  # fmt: skip
    before = [ask() for ask in asked]
    with bars(given):
        assert [ask() for ask in asked] == [was and moving for was in before]
    assert [ask() for ask in asked] == before
    assert any(before)
