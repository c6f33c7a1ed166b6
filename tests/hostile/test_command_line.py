"""The command when things go wrong: one line, a known exit code, and no work lost."""

import dataclasses
import errno
import functools
import importlib
import json
import os
import socket
from pathlib import Path

import pytest
import torch

from diffusers_repr.cli import EXIT_CODES, layers, main, options
from diffusers_repr.denoiser import Denoiser
from diffusers_repr.sweep import select_features
from diffusers_repr.sweep.selection import Selection
from diffusers_repr.tasks import Probe
from tests.tasks.planted import dataset, fitted, images, pipeline
from tests.testers.disk import mounted

MODEL = ["no/such/model/at/all", "no-data"]
COMMANDS = {  # that take --device or --out, with arguments that would fail later
    "extract": [*MODEL, "--layers", "x", "--timesteps", "1"],
    "select": [*MODEL, "--timesteps", "1"],
    "probe": [*MODEL, "--layers", "x", "--timesteps", "1"],
    "align": [MODEL[0], "no/such/encoder/at/all", MODEL[1]],
    "convert": ["no.pt"],
    "match": ["no.png", "nor.png", "--model", MODEL[0]],
    "predict": ["no-probe", "no.png"],
    "segment fit": MODEL,
    "segment predict": ["no-segmenter", "no.png"],
    "evaluate": ["no.yaml"],
    "segment open": ["no-segmenter", "no.png"],
}
OWN = {
    "extract": "manifest.json", "select": "selection.json", "probe": "probe.json", "align": "alignment.json",
    "match": "matches.json", "convert": "model_index.json", "segment fit": "segmentation.json",
    "segment predict": "masks.jsonl", "segment open": "segments.jsonl", "evaluate": "recipe.yaml",
}  # fmt: skip


class PanicException(BaseException):
    """As libraries in Rust raise."""


def not_utf8():
    try:
        b"\xff".decode()
    except UnicodeDecodeError as error:
        return error
    raise AssertionError


RAISED = [
    (ValueError("one\n  two\x1b[31m"), 2, "one two [31m"),
    (ValueError(), 2, "ValueError"),
    (not_utf8(), 2, "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    (FileNotFoundError("There is no folder 'x'."), 2, "There is no folder 'x'."),
    (KeyError("x"), 1, "not foreseen: KeyError: 'x'. Please report it; --debug shows where it arose."),
    (AssertionError(), 1, "not foreseen: AssertionError: . Please report it; --debug shows where it arose."),
    (RecursionError("deep"), 1, "not foreseen: RecursionError: deep."),
    (PanicException("rust"), 1, "not foreseen: PanicException: rust. Please report"),
    (ExceptionGroup("several", [KeyError("x")]), 1, "not foreseen: ExceptionGroup: several (1 sub-exception)."),
    (MemoryError(), 1, "out of memory. Try a smaller --batch_size"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "out of memory: CUDA out of memory. Try a smaller"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory: DefaultCPUAllocator"),
    (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
    (ConnectionResetError(104, "reset"), 2, "reset"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize(("raised", "code", "told"), RAISED, ids=lambda value: type(value).__name__)
def test_no_exception_reaches_the_shell(monkeypatch, capsys, raised, code, told):
    def run(args):
        raise raised

    monkeypatch.setattr(layers, "run", run)
    assert main(["layers", "model"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diffusers-repr layers: ")
    assert told in err
    assert err.count("\n") == 1
    assert main(["layers", "model", "--debug"]) == code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_command_that_cannot_be_declared(monkeypatch, capsys):
    @dataclasses.dataclass
    class Settings:
        def __post_init__(self):
            raise ImportError("No module named 'x'")

    monkeypatch.setattr(layers, "Settings", Settings)
    assert main(["layers"]) == 2
    assert capsys.readouterr().err == "diffusers-repr layers: No module named 'x'\n"


def test_a_connection_that_breaks_is_no_success(monkeypatch, capfd):
    ours, theirs = socket.socketpair()
    theirs.close()
    importlib.import_module("diffusers_repr.cli.select")  # a command of the name of a module of Python
    monkeypatch.setattr(layers, "run", lambda args: ours.sendall(b"x"))
    with open(os.devnull, "w") as out:
        monkeypatch.setattr("sys.stdout", out)
        code = main(["layers", "model"])
    ours.close()
    assert (code, capfd.readouterr().err) == (2, "diffusers-repr layers: [Errno 32] Broken pipe\n")


def test_exit_codes_are_told(capsys):
    for words in (["--help"], ["push", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        assert EXIT_CODES in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["push"])
    assert stopped.value.code == 2
    told = (Path(__file__).parents[2] / "docs" / "command_line.md").read_text()
    for line in EXIT_CODES.splitlines()[1:]:
        code = line.split()[0]
        assert f"| {code} |" in told


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("extract", "convert")])
def test_the_device_is_looked_for_first(command, tmp_path, capsys):
    out = [] if command == "predict" else ["--out", str(tmp_path / "out")]
    for device in ("cuda:99", "toaster", "", "meta", "cpu:1"):
        assert main([*command.split(), *COMMANDS[command], *out, "--device", device]) == 2
        assert f"--device {device!r} is not on this machine; it has cpu" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", OWN)
def test_out_is_looked_at_first(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "dead").symlink_to(tmp_path / "none")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("years of work")
    cases = {
        "file": "is a file or a dead link",
        "file/out": "is a file or a dead link",
        "dead": "is a file or a dead link",
        "foreign": "is not empty and holds no",
    }
    before = sorted(tmp_path.rglob("*"))
    for name, told in cases.items():
        assert main([*command.split(), *COMMANDS[command], "--out", str(tmp_path / name)]) == 2
        assert told in capsys.readouterr().err, name
    assert main([*command.split(), *COMMANDS[command], "--out", " "]) == 2
    assert "--out is empty" in capsys.readouterr().err
    if command in ("probe", "convert", "segment fit"):
        monkeypatch.chdir(tmp_path / "foreign")
        assert main([*command.split(), *COMMANDS[command], "--out", ".."]) == 2
        assert "is or holds the working directory" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / OWN[command]).write_text("{}")
    for name in ("own", "new/deep"):  # taken with --overwrite, so that the next mistake is told
        for more in ([], ["--overwrite"]):
            assert main([*command.split(), *COMMANDS[command], "--out", str(tmp_path / name), *more]) == 2
            refused = name == "own" and not more and command not in ("extract", "evaluate")  # which go on
            assert ("--overwrite" in capsys.readouterr().err) == refused, (name, more)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "12k") as disk:
        yield disk


def test_a_full_disk_is_told_before_the_work(small_disk, capsys):
    for command in OWN:
        assert main([*command.split(), *COMMANDS[command], "--out", str(small_disk / "new" / "out")]) == 1
        assert "the disk is full (" in capsys.readouterr().err
    (small_disk / "x").write_bytes(b"x" * 12288)
    assert main(["probe", *COMMANDS["probe"], "--out", str(small_disk / "out")]) == 1
    assert "cannot be written: No space left on device" in capsys.readouterr().err


@pytest.fixture(scope="module")
def selection():
    denoiser = Denoiser.from_pipe(pipeline())
    return select_features(
        denoiser, dataset(24), dataset(12, seed=1), [50, 400], ["mid_block", "up_blocks.0"], seeds=[0], progress=False
    )


def test_a_full_disk_while_saving_leaves_nothing_and_loses_nothing(small_disk, selection, tmp_path):
    plain = functools.partial(selection.save, heatmap=False)
    (small_disk / "other").write_bytes(b"x" * 8192)
    for save in (fitted().save_pretrained, plain):
        with pytest.raises(OSError, match="No space left on device"):
            save(small_disk / "out")
        assert [file.name for file in small_disk.iterdir()] == ["other"]
    (small_disk / "out").mkdir()
    (small_disk / "out" / "selection.json").write_text("the old one")
    with pytest.raises(OSError, match="No space left on device"):
        plain(small_disk / "out")
    assert [(file.name, file.read_text()) for file in (small_disk / "out").iterdir()] == [
        ("selection.json", "the old one")
    ]
    fitted().save_pretrained(tmp_path / "probe")
    assert (tmp_path / "probe" / "probe.json").is_file()
    plain(tmp_path / "selection")
    assert Selection.load(tmp_path / "selection").best == selection.best


def test_the_command_keeps_a_probe_that_it_could_not_save(small_disk, tmp_path, monkeypatch, capsys):
    pipeline().save_pretrained(tmp_path / "model")
    dataset(12).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "spare").mkdir()
    monkeypatch.setattr(options, "_ROOM", 0)  # as if the disk had filled up during the work
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spare"))
    words = ["probe", str(tmp_path / "model"), str(tmp_path / "train.parquet"), "--out", str(small_disk / "out")]
    assert main([*words, "--layers", "mid_block", "--timesteps", "50", "--quiet"]) == 1
    out, err = capsys.readouterr()
    (kept,) = (tmp_path / "spare").glob("diffusers-repr-probe-*")
    told = err.splitlines()[-1]
    assert "Could not save to" in told
    assert "No space left on device" in told
    assert f"Nothing is lost: the probe is in {str(kept)!r}" in told
    assert "Probe(LinearHead" in out
    assert list(small_disk.iterdir()) == []
    assert len(Probe.from_pretrained(kept)(images(2)[0]).labels) == 2
    assert json.loads((kept / "probe.json").read_text())["base"]["name"] == "../../model"


def test_where_nothing_can_be_saved_the_first_error_is_told(tmp_path):
    def save(folder):
        calls.append(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    calls = []
    with pytest.raises(OSError, match="No space left"):
        options.save_or_keep(save, str(tmp_path / "out"), "probe", [str(tmp_path), str(tmp_path / "none")])
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []
