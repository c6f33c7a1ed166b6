import json
import shutil
import warnings

import pytest
import torch

from diffusers_repr.training.checkpoints import (
    CheckpointError,
    drop_partial,
    find_checkpoint,
    list_checkpoints,
    read_state,
    read_tensors,
    save_checkpoint,
)
from tests.testers.disk import mounted

IDENTITY = {"seed": 0, "data": {"rows": 3}, "betas": (0.9, 0.99)}


def save(folder, step, keep=10, size=64):
    tensors = {"model": {"w": torch.full((size,), float(step))}, "optimizer": {"main/w/step": torch.tensor(step)}}
    return save_checkpoint(folder, step, tensors, {"identity": IDENTITY, "place": [step / 3]}, keep)


def find(folder, resume="latest", identity=IDENTITY):
    return find_checkpoint(folder, resume, identity)


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 5)
    assert path == tmp_path / "checkpoint-00000005"
    assert torch.equal(read_tensors(path, "model")["w"], torch.full((64,), 5.0))
    assert read_tensors(path, "optimizer")["main/w/step"].item() == 5
    state = read_state(path)
    assert state["place"] == [5 / 3]
    assert state["step"] == 5
    assert find(tmp_path) == path


def test_nothing_to_go_on_from(tmp_path):
    assert find(tmp_path / "none") is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-00000001").write_text("a file")
    assert find(tmp_path) is None
    assert find(tmp_path, "none") is None


def test_the_newest_is_by_number(tmp_path):
    for step in (99_999_999, 100_000_000, 2):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "checkpoint-00000002",
        "checkpoint-99999999",
        "checkpoint-100000000",
    ]
    assert find(tmp_path).name == "checkpoint-100000000"


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
    for step in range(1, 6):
        save(tmp_path, step, keep)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        f"checkpoint-0000000{step}" for step in range(6 - keep, 6)
    ]


def test_later_checkpoints_of_a_run_that_was_set_back_do_not_count(tmp_path):
    for step in (2, 8):
        save(tmp_path, step)
    save(tmp_path, 4, keep=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["4", "8"]
    save(tmp_path, 8, keep=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["8"]


def truncate(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-3])


def empty(path):
    (path / "model.safetensors").write_bytes(b"")


def flip(path):
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "model.safetensors").write_bytes(bytes(data))


def remove(path):
    (path / "optimizer.safetensors").unlink()


def cut_state(path):
    (path / "state.json").write_text((path / "state.json").read_text()[:-20])


def change_state(path):
    (path / "state.json").write_text((path / "state.json").read_text().replace('"step": ', '"step": 1'))


def list_state(path):
    (path / "state.json").write_text("[]")


def remove_state(path):
    (path / "state.json").unlink()


DAMAGE = [
    (truncate, "model.safetensors has not the content"),
    (empty, "model.safetensors has not the content"),
    (flip, "model.safetensors has not the content"),
    (remove, "optimizer.safetensors is missing"),
    (cut_state, "state.json cannot be read"),
    (change_state, "state.json has not the content"),
    (list_state, "state.json cannot be read"),
    (remove_state, "state.json cannot be read"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, damage, message):
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "checkpoint-00000003")
    with pytest.warns(UserWarning, match=f"checkpoint-00000003 is damaged: .*{message}.*Going on from .*00000002"):
        assert find(tmp_path).name == "checkpoint-00000002"
    damage(tmp_path / "checkpoint-00000002")
    with pytest.warns(UserWarning, match=r"00000003 is damaged.*00000002 is damaged"):
        assert find(tmp_path).name == "checkpoint-00000001"
    with pytest.raises(CheckpointError, match=f"checkpoint-00000003 is damaged: .*{message}"):
        find(tmp_path, "checkpoint-00000003")
    damage(tmp_path / "checkpoint-00000001")
    with pytest.raises(CheckpointError, match="No checkpoint in .* is whole: .*00000001 is damaged.*start anew"):
        find(tmp_path)


def test_a_whole_checkpoint_warns_of_nothing(tmp_path):
    save(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find(tmp_path)


def test_half_written_ones_are_ignored_and_removed(tmp_path):
    whole = save(tmp_path, 1)
    for name in (".checkpoint-00000002.abc.tmp", ".checkpoint-00000001.abc.old"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / ".checkpoint-notes").mkdir()
    assert find(tmp_path) == whole
    drop_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-notes", "checkpoint-00000001"]
    drop_partial(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, r"\{'seed': 0\}"),
        ({"data": {"rows": 4}}, r"\{'data': \{'rows': 3\}\}"),
        ({"new": 1}, r"\{'new': None\}"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, told):
    save(tmp_path, 1)
    for resume in ("latest", "checkpoint-00000001"):
        with pytest.raises(ValueError, match=rf"checkpoint-00000001 is of a run with {told}. Run with these"):
            find(tmp_path, resume, {**IDENTITY, **change})
    with pytest.raises(ValueError, match=r"with \{'data': \{'rows': 3\}\}.* \(now: \{'data': \{'rows': 4\}\}\)"):
        find(tmp_path, identity={**IDENTITY, "data": {**IDENTITY["data"], "rows": 4}})
    with pytest.raises(ValueError, match=r"of a run with \{'seed': 0\}"):
        find(tmp_path, identity={k: v for k, v in IDENTITY.items() if k != "seed"})


def test_named_checkpoints(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    assert find(tmp_path, "checkpoint-00000001").name == "checkpoint-00000001"
    assert find(tmp_path, str(tmp_path / "checkpoint-00000001")).name == "checkpoint-00000001"
    with pytest.raises(ValueError, match="No checkpoint 'checkpoint-7' .*there are .'checkpoint-00000001'"):
        find(tmp_path, "checkpoint-7")
    with pytest.raises(ValueError, match="another --output_dir"):
        find(tmp_path, "none")


def test_a_state_that_is_no_json_is_an_error_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, {"identity": {}, "x": torch.zeros(1)}, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "256k") as disk:
        yield disk


def test_a_disk_that_is_really_full(small_disk):
    with pytest.raises(OSError, match="Could not write .*00000001.*There is no earlier checkpoint"):
        save(small_disk, 1, size=100_000)
    save(small_disk, 2, size=100)
    with pytest.raises(OSError, match="Could not write .*The last checkpoint is checkpoint-00000002; free some"):
        save(small_disk, 3, size=100_000)
    assert [path.name for path in small_disk.iterdir()] == ["checkpoint-00000002"]  # no half of another
    assert find(small_disk).name == "checkpoint-00000002"
    assert json.loads((small_disk / "checkpoint-00000002" / "state.json").read_text())["step"] == 2


def test_a_full_disk_by_another_name(tmp_path, monkeypatch):
    """The same where no small disk can be mounted."""
    save(tmp_path, 1)

    def full(*given, **names):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_repr.training.checkpoints.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*The last checkpoint is checkpoint-00000001"):
        save(tmp_path, 2)
    assert find(tmp_path).name == "checkpoint-00000001"
    assert len(list(tmp_path.iterdir())) == 1
