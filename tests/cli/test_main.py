"""The command itself: version, warnings, pipes that close, errors shown in full."""

import os
import sys
import warnings

import pytest

from diffusers_repr import __version__
from diffusers_repr.cli import layers, main
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
