"""Selections, alignments, metric records, checkpoints, logs and recipes of others: one good one each, changed."""

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch

from diffusers_repr.cli.convert import read_config
from diffusers_repr.config import parse_recipe
from diffusers_repr.data import DataConfig
from diffusers_repr.metrics import MetricRecord
from diffusers_repr.sweep import Alignment, AlignmentCell, Selection, SelectionCell
from diffusers_repr.sweep.selection import FeatureSet
from diffusers_repr.training import TrainingConfig
from diffusers_repr.training import checkpoints as saved
from diffusers_repr.training.logs import read_log
from tests.hostile.corrupt import STRANGE, changed, sweep
from tests.testers.disk import mounted


def place(layer, order):
    return {"layer": layer, "order": order, "timestep": 7, "nsr": 0.5, "flops_share": 0.5, "dim": 8}


def selection():
    cells = tuple(
        SelectionCell(**place(layer, i), noise="per_image", score=0.9 - i / 10, penalty=0.1)
        for i, layer in enumerate("ab")
    )
    best = dataclasses.replace(cells[0], mean=0.9, std=0.0, seed_scores=(0.9,))
    sets = {"layers": FeatureSet(("a", "b"), (7,), "per_image", 0.95, 0.1, 16, (("a", 0.9), ("b", 0.95)), ("a", "b"))}
    recipe = {"model": "m", "pooling": "mean", "batch_size": 8, "image_size": [8, 8], "classes": [0, 1]}
    return Selection((best, cells[1]), best, (best,), sets, "accuracy", (0,), recipe)


def alignment():
    cells = tuple(AlignmentCell(**place(name, i), scores={"cka": 0.5 + i / 4}) for i, name in enumerate("ab"))
    data = {"name": "pets", "samples": 9, "images_hash": "ab"}
    recipe = {
        "model": {"name": "m", "revision": None},
        "encoder": {"name": "dino", "weights": "ab"},
        "features": "tokens",
        "data": data,
        "test": None,
        "resize": "8x8",
        "image_size": [8, 8],
        "noise": "per_image",
        "sample_posterior": False,
        "seed": 0,
        "k": 10,
        "settings": {"cka": {"clamp_quantile": None}},
        "prompt": None,
        "class_labels": None,
        "backend": {"name": "diffusers-repr", "version": "1"},
    }
    return Alignment(cells, ("cka",), {}, recipe)


RECORD = MetricRecord("fid", 9.0, {"name": "dino"}, "global", {"real": 5}, "ab", "8x8", "cd", {"name": "t"}, 3, 0)


def use_selection(folder):
    found = Selection.load(folder)
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.best in found.cells


def use_alignment(folder):
    found = Alignment.load(folder)
    json.dumps(found.to_dict(), allow_nan=False)
    if found.to_dict()["best"] is not None:
        found.record()


def use_record(folder):
    found = MetricRecord.load(folder / "record.json")
    json.dumps(found.to_dict(), allow_nan=False)
    assert found - found == 0


KINDS = {
    "selection": ("selection.json", lambda folder: selection().save(folder, heatmap=False), use_selection),
    "alignment": ("alignment.json", lambda folder: alignment().save(folder, plot=False), use_alignment),
    "record": ("record.json", lambda folder: RECORD.save(folder / "record.json"), use_record),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_of_a_result(tmp_path, kind):
    name, make, use = KINDS[kind]
    make(tmp_path)
    path = tmp_path / name
    assert sweep(json.loads(path.read_text()), path.write_text, lambda: use(tmp_path), name) > 15


@pytest.mark.parametrize(
    ("kind", "place", "value", "message"),
    [
        ("selection", "cells", [], "cells is a list of 0"),
        ("selection", "cells 1 score", math.nan, "cells is nan|score is nan"),
        ("selection", "cells 1 dim", -1, r"cells\[1\].dim is -1"),
        ("selection", "cells 1", None, r"cells\[1\] is null"),
        ("selection", "cells 1", {"layer": "a", "surprise": 1}, r"cells\[1\] has no 'order'"),
        ("selection", "best layer", "c", "best is none of the cells"),
        ("selection", "best", [], "best is a list of 0"),
        ("selection", "sets", None, "sets is null"),
        ("selection", "sets layers steps", [["a"]], r"steps\[0\] is a list of 1; allowed is a list of 2"),
        ("selection", "seeds", [], "seeds is a list of 0"),
        ("selection", "recipe batch_size", 0, "recipe.batch_size is 0"),
        ("selection", "recipe image_size", [1e6, 1e6], r"recipe.image_size\[0\] is 1000000.0"),
        ("alignment", "cells 0 scores", {"fid": 1.0}, r"cells\[0\].scores are not those of metrics"),
        ("alignment", "cells 0 scores cka", "high", r"cells\[0\].scores.cka is 'high'"),
        ("alignment", "metrics", [], "metrics is a list of 0"),
        ("alignment", "recipe settings", {}, "recipe.settings lacks"),
        ("alignment", "recipe data", None, "recipe.data is null"),
        ("record", "value", math.inf, "value is inf"),
        ("record", "value", True, "value is true"),
        ("record", "counts", {"real": -5}, "counts.real is -5"),
        ("record", "k", 0.5, "k is 0.5"),
        ("record", "encoder", "dino", "encoder is 'dino'"),
    ],
)
def test_a_result_that_says_what_cannot_be(tmp_path, kind, place, value, message):
    name, make, use = KINDS[kind]
    make(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps(changed(json.loads(path.read_text()), place, value)))
    with pytest.raises(ValueError, match=rf"{name}.*({message})"):
        use(tmp_path)


@pytest.mark.parametrize("kind", ["selection", "alignment"])
def test_a_full_disk_leaves_the_old_result_whole(tmp_path, kind, monkeypatch):
    name, make, use = KINDS[kind]
    big = (selection if kind == "selection" else alignment)()
    big = dataclasses.replace(big, recipe={**big.recipe, "notes": os.urandom(40_000).hex()})
    with mounted(tmp_path / "disk", "64k") as disk:
        make(disk / "out")
        before = {file.name: file.read_bytes() for file in (disk / "out").iterdir()}
        with pytest.raises(OSError, match="No space left"):
            big.save(disk / "out", False)
        assert {file.name: file.read_bytes() for file in (disk / "out").iterdir()} == before
        use(disk / "out")
        make(disk / "out")
    # The second of two files fails: the first is not renamed either
    write, calls = os.fsync, []

    def failing(descriptor):
        calls.append(descriptor)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        write(descriptor)

    monkeypatch.setattr(type(big), "heatmap" if kind == "selection" else "plot", lambda self: b"picture")
    make(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="No space left"):
        big.save(tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


# Checkpoints


@pytest.fixture
def checkpoint(tmp_path):
    state = {
        "progress": {"step": 3, "skipped": 0, "skipped_in_a_row": 0, "sums": {"loss": 1.0}, "counts": {"loss": 2}},
        "ema_updates": 3,
        "scaler": {},
        "streams": None,
        "identity": {"seed": 0},
    }
    return saved.save_checkpoint(tmp_path, 3, {"model": {"w": torch.ones(2)}}, state, 5)


def resigned(path, text):
    """A state whose checksum was made for it, as one who means harm would."""
    state = json.loads(text)
    if isinstance(state, dict) and "checksum" in state:
        state.pop("checksum")
        state["checksum"] = saved._checksum(state)
    (path / "state.json").write_text(json.dumps(state))


def test_every_value_of_a_checkpoints_state(checkpoint):
    good = json.loads((checkpoint / "state.json").read_text())

    def use():
        found = saved.find_checkpoint(checkpoint.parent, "latest", good["identity"])
        saved.read_tensors(found, "model")

    errors = (ValueError, saved.CheckpointError)
    good.pop("checksum")
    signed = {**good, "checksum": "x"}
    refused = sweep(
        signed, lambda text: resigned(checkpoint, text), use, "state.json", "checkpoint-00000003", errors=errors
    )
    assert refused > 15


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"../../x.safetensors": {"bytes": 1, "sha256": "a"}}, "a relative path inside the folder"),
        ({"/etc/x.safetensors": {"bytes": 1, "sha256": "a"}}, "a relative path inside the folder"),
        ({"x.bin": {"bytes": 1, "sha256": "a"}}, "ends in .safetensors"),
        ({"x.safetensors": {"bytes": -1, "sha256": "a"}}, "bytes is -1"),
        ({"x.safetensors": {"sha256": "a"}}, "has no 'bytes'"),
        ([], "files is a list of 0"),
    ],
)
def test_files_that_a_checkpoint_names(checkpoint, files, message):
    state = json.loads((checkpoint / "state.json").read_text())
    resigned(checkpoint, json.dumps({**state, "files": files}))
    with pytest.raises(saved.CheckpointError, match=rf"state\.json cannot be read.*{message}"):
        saved.find_checkpoint(checkpoint.parent, "latest", {"seed": 0})


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.tensor([1.0, math.nan]), "1 of 2 values that are not finite"), (torch.ones(2).int(), "holds torch.int32")],
)
def test_the_numbers_of_a_checkpoint(value, message):
    with pytest.raises(saved.CheckpointError, match=rf"'a' in ema\.safetensors .*{message}"):
        saved.check_same_tensors(Path("checkpoint-1"), "ema", {"a": value}, {"a": torch.ones(2)})


def test_a_checkpoints_file_that_leads_elsewhere(checkpoint, tmp_path):
    (checkpoint / "model.safetensors").rename(tmp_path / "elsewhere")
    (checkpoint / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(saved.CheckpointError, match="leads out of the folder"):
        saved.find_checkpoint(checkpoint.parent, "latest", {"seed": 0})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "line 2 is a list of 0"),
        ("{", "line 2 is no JSON"),
        ("[" * 100_000, "line 2 is no JSON"),
        ("\xff", "line 2 is no JSON"),
        ("{}", "line 2 has no 'step'"),
        ('{"step": "x"}', "line 2: step is 'x'"),
        ('{"step": 1, "loss": NaN}', "line 2: loss is nan"),
        ('{"step": 1, "loss": {}}', "line 2: loss is an object"),
    ],
)
def test_a_log_that_is_none(tmp_path, line, message):
    path = tmp_path / "loss.jsonl"
    path.write_bytes(b'{"step": 0, "loss": null}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=rf"loss\.jsonl, {message}"):
        read_log(path, 5)


# Recipes


def laughs(depth=12):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, depth)]
    return "\n".join(lines)


TEXTS = {
    "billion laughs": (laughs(), r"line 2: the alias \*a0 is not followed"),
    "a list in itself": ("seed: &a [*a]", r"line 1: the alias \*a"),
    "merge": ("a: &a {b: 1}\nc:\n  <<: *a", "line 3: the alias"),
    "python object": ("seed: !!python/object/apply:os.system [exit 1]", "is no YAML"),
    "python name": ("seed: !!python/name:os.system", "is no YAML"),
    "tab": ("seed:\t- 1\n\t- 2", "is no YAML"),
    "deep": ("seed: " + "[" * 500 + "]" * 500, "nested deeper than 50"),
    "twice": ("seed: 1\nseed: 2", "line 2: the key 'seed' stands twice"),
    "large": ("# " + "x" * (1 << 20), "has 1048578 bytes"),
    "latin": (b"dataset_name: caf\xe9", r"not UTF-8 text \(byte 17\)"),
    "list": ("- 1", "holds a list"),
    "empty": ("", "holds a NoneType"),
    "closest": ("learning_rat: 1", r"Unknown key 'learning_rat' in .*\['learning_rate'"),
    "number as a key": ("7: 1", "Unknown key 7"),
    "NaN": ("learning_rate: .nan", "learning_rate is nan"),
    "infinity": ("learning_rate: .inf", "learning_rate is inf"),
    "huge": (f"seed: {10**30}", "seed is 1000000000000000000000000000000"),
    "date": ("seed: 2020-01-01", "seed is datetime.date"),
    "list for a number": ("seed: [1]", "seed is a list of 1"),
    "mapping for a text": ("dataset_name: {a: 1}", "dataset_name is an object of 1"),
    "number for a switch": ("random_flip: 3", "random_flip is 3; allowed is true or false"),
    "none of the choices": ("center_crop: middle", "center_crop is 'middle'; allowed is one of 'adm', 'fit'"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_recipe_that_is_none(tmp_path, case):
    text, message = TEXTS[case]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message) as caught:
        parse_recipe([TrainingConfig, DataConfig], ["--config", str(path)])
    assert "recipe.yaml" in str(caught.value)


def test_every_kind_of_setting_names_its_key(tmp_path):
    path, refused = tmp_path / "recipe.yaml", []
    for key in ("seed", "learning_rate", "random_flip", "dataset_name", "center_crop", "max_train_steps"):
        for value in STRANGE:
            path.write_text(f"{key}: {json.dumps(value).replace('NaN', '.nan')}")
            try:
                parse_recipe([TrainingConfig, DataConfig], ["--config", str(path)])
            except ValueError as error:
                refused.append((key, str(error)))
    assert all(key in told for key, told in refused)
    assert len(refused) > 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ('{"num_layers": NaN}', "num_layers is nan"),
        ('{"num_layers": 1e400}', "num_layers is inf"),
        ('{"num_layers": "' + "x" * 500 + '"}', "num_layers is 'xxx"),
        ('{"num_layers": 1000000000000}', "num_layers is 1000000000000"),
        ('{"num_layers": {"a": 1}}', "num_layers is an object of 1"),
        ("[" * 100_000, "is no file"),
        ('{"a":' * 5_000, "no JSON or YAML"),
        (laughs(), "the alias"),
        ("num_layers: !!python/name:os.system", "is no YAML"),
    ],
)
def test_the_config_of_convert(tmp_path, config, message):
    if not config.startswith(("{", "[")):
        (tmp_path / "c.yaml").write_text(config)
        config = str(tmp_path / "c.yaml")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_config(config)
