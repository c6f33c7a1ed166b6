"""The one way stores are written: stopped, killed, damaged, on a full disk, in another's folder; in both formats."""

import errno
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_repr.store import shards, write
from diffusers_repr.store.assignment_store import AssignmentLayout, AssignmentStore
from diffusers_repr.store.manifest import recipe_hash
from diffusers_repr.store.tensor_cache import TensorCache
from diffusers_repr.store.tensors import INDEX, TensorLayout
from diffusers_repr.store.write import Plan, choose_shard_size, write_store
from tests.testers.disk import mounted

ROWS = 11  # prime: shards of 4 leave a short one


def parquet(seed, shard_size):
    recipe = {"assigner": {"seed": seed}, "data": {"rows": ROWS}}
    layout = AssignmentLayout(ROWS, shard_size, recipe_hash(recipe), {"neighbours": (600,)})
    values = np.random.default_rng(seed).integers(0, 2**60, (ROWS, 600))
    return AssignmentStore, layout, recipe, lambda rows: {"row": rows, "neighbours": values[rows]}


def safetensors(seed, shard_size):
    recipe = {"vae": {"seed": seed}, "mirrors": 1, "dtype": "float32"}
    layout = TensorLayout(ROWS, shard_size, recipe_hash(recipe), "latents", {"moments": (1, 1000)}, "float32")
    values = torch.randn(ROWS, 1, 1000, generator=torch.Generator().manual_seed(seed))
    return TensorCache, layout, recipe, lambda rows: {INDEX: torch.tensor(rows), "moments": values[rows]}


@pytest.fixture(params=[parquet, safetensors], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def plan(kind, out, seed=0, shard_size=4, **settings):
    store, layout, recipe, values = kind(seed, shard_size)

    def rows(spans):
        for start, stop in spans:
            for at in range(start, stop, 3):
                yield values(list(range(at, min(at + 3, stop))))

    return Plan(store, Path(out), layout, recipe, rows, progress=False, **settings)


def make(kind, out, **settings):
    made = plan(kind, out, **settings)
    write_store(made)
    return made.store.open_folder(made.out)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def shard_files(folder):
    return sorted(path for path in (folder / "data").iterdir())


def test_the_same_call_again_does_nothing(kind, tmp_path):
    store = make(kind, tmp_path / "out")
    before = contents(tmp_path / "out")
    stamps = [path.stat().st_mtime_ns for path in shard_files(tmp_path / "out")]
    again = plan(kind, tmp_path / "out")
    write_store(replace(again, rows=lambda spans: iter(()) if not spans else pytest.fail("a shard was written again")))
    assert contents(tmp_path / "out") == before
    assert [path.stat().st_mtime_ns for path in shard_files(tmp_path / "out")] == stamps
    assert (len(store), store.layout.shards, len(stamps)) == (ROWS, 3, 3)


@pytest.mark.parametrize("stop", range(5))
def test_resumes_byte_for_byte_after_a_stop_anywhere(kind, tmp_path, stop):
    """Before a shard, within one and between two: batches are of 3 and 1, 3 and 1, 3 rows."""
    whole = contents(make(kind, tmp_path / "whole").folder)
    stopped = plan(kind, tmp_path / "out")

    def rows(spans):
        for count, batch in enumerate(stopped.rows(spans)):
            if count == stop:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        write_store(replace(stopped, rows=rows))
    assert len(shard_files(tmp_path / "out") if stop else []) == stop // 2
    lost = f"not finished: {4 * (stop // 2)} of 11 rows .{stop // 2} of 3 shards.*-0000{stop // 2}-.*keeps whole"
    with pytest.raises(ValueError, match=lost):
        stopped.store.open_folder(tmp_path / "out")
    make(kind, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_a_killed_process_is_continued(kind, tmp_path):
    """SIGKILL while the second shard is about to take its name; what the kill left is cleared."""
    child = os.fork()
    if child == 0:
        rename = os.replace

        def kill(source, target):
            if "00001-of" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        os.replace = kill
        make(kind, tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left, first = shard_files(tmp_path / "out")
    assert left.name.endswith(".tmp")
    assert "00000-of-00003" in first.name
    make(kind, tmp_path / "out").verify()
    assert contents(tmp_path / "out") == contents(make(kind, tmp_path / "whole").folder)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 0xFF
    path.write_bytes(bytes(data))


def drop_a_row(path):
    if path.suffix == ".parquet":
        return pq.write_table(pq.read_table(path).slice(1), path)
    return rewrite(path, {name: tensor[1:].clone() for name, tensor in load_file(path).items()})


def other_recipe(path):
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        told = {key: value.replace(b'"recipe": "', b'"recipe": "0') for key, value in table.schema.metadata.items()}
        return pq.write_table(table.replace_schema_metadata(told), path)
    return rewrite(path, load_file(path), lambda told: told.replace('"recipe": "', '"recipe": "0'))


def rewrite(path, tensors, stamp=str):
    with safe_open(path, "pt") as file:
        told = {key: stamp(value) for key, value in file.metadata().items()}
    save_file(tensors, path, told)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (truncate, "cannot be read"),
        (empty, "cannot be read"),
        (flip_a_byte, "cannot be read|does not fit its checksum"),
        (drop_a_row, "has 3 rows instead of 4|holds .* instead of"),
        (other_recipe, "was not written by this recipe"),
    ],
)
def test_damaged_shards_are_found_named_and_written_anew(kind, tmp_path, caplog, damage, problem):
    store = make(kind, tmp_path / "out")
    before = contents(tmp_path / "out")
    damage(shard_files(tmp_path / "out")[1])
    with pytest.raises(ValueError, match=rf"00001-of-00003\.\w+' ({problem}).*Delete it and run the same"):
        store.verify()
    make(kind, tmp_path / "out")
    assert "00001-of-00003" in caplog.text
    assert "written anew" in caplog.text
    assert contents(tmp_path / "out") == before


def test_rows_of_another_place(tmp_path):
    store = make(parquet, tmp_path / "out")
    path = shard_files(tmp_path / "out")[1]
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, table.schema.field(0), [table["row"].to_numpy() + 1]), path)
    with pytest.raises(ValueError, match="does not hold rows 4 to 7"):
        store.verify()


def test_another_recipe_in_the_same_folder_shows_what_differs(kind, tmp_path):
    make(kind, tmp_path / "out")
    before = contents(tmp_path / "out")
    for change, line in (({"seed": 1}, "seed: 0 -> 1"), ({"shard_size": 5}, "shard_size: 4 -> 5")):
        with pytest.raises(FileExistsError, match=f"another recipe; nothing was changed.*{line}"):
            make(kind, tmp_path / "out", **change)
    assert contents(tmp_path / "out") == before


def test_a_run_without_a_shard_binds_nobody(kind, tmp_path):
    with pytest.raises(RuntimeError, match="rows ended 4 before the end of .*00000-of-00003"):
        write_store(replace(plan(kind, tmp_path / "out"), rows=lambda spans: iter(())))
    make(kind, tmp_path / "out", seed=1).verify()


def test_a_lost_manifest_is_made_again(kind, tmp_path):
    store = make(kind, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        type(store).open_folder(tmp_path / "out")
    make(kind, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(FileExistsError, match=f"no {store.noun} with this recipe"):
        make(kind, tmp_path / "out", seed=1)


def test_a_damaged_manifest(kind, tmp_path):
    store = make(kind, tmp_path / "out")
    for text, message in (('{"complete": tr', "not valid JSON"), ('{"complete": true}', "damaged, or of another ver")):
        (tmp_path / "out/manifest.json").write_text(text)
        for use in (lambda: make(kind, tmp_path / "out"), lambda: type(store).open_folder(tmp_path / "out")):
            with pytest.raises(ValueError, match=rf"manifest\.json.*{message}"):
                use()


def test_a_folder_of_something_else_is_left_alone(kind, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt.*nothing was changed. Give another folder"):
        make(kind, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {"thesis.txt", ".extract.tmp"}


def test_two_runs_at_once(kind, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out/.extract.tmp", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="Another `.*` is writing"):
            make(kind, tmp_path / "out")
    make(kind, tmp_path / "out")


def test_a_full_disk_loses_nothing(kind, tmp_path, monkeypatch):
    whole, write_shard = contents(make(kind, tmp_path / "whole").folder), shards.write_shard

    def full(folder, layout, shard):
        if shard == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(folder, layout, shard)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_shard", full)
        with pytest.raises(OSError, match=r"disk is full.*-00001-.*1 of 3 shards.*are whole.*same command") as info:
            make(kind, tmp_path / "out")
    assert info.value.errno == errno.ENOSPC
    assert len(shard_files(tmp_path / "out")) == 1
    make(kind, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "48k") as disk:
        yield disk


def test_a_disk_that_is_really_full(kind, small_disk):
    with pytest.raises(OSError, match="disk is full.*shards in.*are whole"):
        make(kind, small_disk / "out")
    kept = shard_files(small_disk / "out")
    assert 1 <= len(kept) < 3
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    make(kind, small_disk / "out").verify()


def test_shard_size_follows_from_bytes_or_the_folder(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 1000)
    store = plan(kind, tmp_path / "out").store
    for most, given, size in ((50, None, 11), (5, None, 5), (5, 9, 9)):
        assert choose_shard_size(store, tmp_path / "out", most, 90, given) == size
    assert choose_shard_size(store, tmp_path / "out", 50, 10**6, None) == 1
    make(kind, tmp_path / "out")
    assert choose_shard_size(store, tmp_path / "out", 50, 90, None) == 4


def test_a_kept_shard_is_shown_to_the_source(kind, tmp_path):
    make(kind, tmp_path / "out")
    seen = []
    write_store(replace(plan(kind, tmp_path / "out"), check_kept=seen.append))
    assert seen == [0, 1, 2]


def test_only_whole_reading_sees_a_changed_value(tmp_path):
    make(safetensors, tmp_path / "out")
    flip_a_byte(shard_files(tmp_path / "out")[1])
    bad = contents(tmp_path / "out")
    make(safetensors, tmp_path / "out", whole=False)
    assert contents(tmp_path / "out") == bad
    make(safetensors, tmp_path / "out").verify()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["complete"]
