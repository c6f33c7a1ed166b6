"""The latent cache stopped, killed, damaged and on a full disk: it goes on, byte for byte."""

import errno
import os
import signal
import subprocess

import datasets
import pytest
import torch
from safetensors.torch import load_file

from diffusers_repr.store import write
from diffusers_repr.store.tensor_cache import TensorCache
from tests.data.latent_cases import ROWS, contents, make
from tests.testers.disk import mounted


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_same_call_again_does_nothing(tmp_path, monkeypatch):
    make(tmp_path / "out")
    before = contents(tmp_path / "out")
    stamps = {p: os.stat(p).st_mtime_ns for p in (tmp_path / "out/data").iterdir()}
    monkeypatch.setattr(write, "_write_one", lambda *a: pytest.fail("a whole shard was written again"))
    make(tmp_path / "out", verify=True)
    assert contents(tmp_path / "out") == before
    assert {p: os.stat(p).st_mtime_ns for p in (tmp_path / "out/data").iterdir()} == stamps


def test_resumes_byte_for_byte_after_a_stop_anywhere(tmp_path, monkeypatch):
    make(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    write_shard = write.write_shard
    for stop in range(3):
        out, calls = tmp_path / f"stopped{stop}", []

        def interrupted(*args, calls=calls, stop=stop):
            calls.append(1)
            if len(calls) > stop:
                raise KeyboardInterrupt
            return write_shard(*args)

        with monkeypatch.context() as patch:
            patch.setattr(write, "write_shard", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make(out)
        assert len(list((out / "data").glob("*.safetensors"))) == stop
        shards = min(4 * stop, ROWS)
        with pytest.raises(ValueError, match=f"not finished: {shards} of 11 rows .{stop} of 3 shards.*keeps whole"):
            TensorCache.open(out, "latents")
        make(out, batch_size=1)
        got = contents(out)
        assert got.keys() == whole.keys()
        for name in whole:
            if name.endswith("safetensors"):
                for key, tensor in load_file(out / name).items():
                    torch.testing.assert_close(tensor, load_file(tmp_path / "whole" / name)[key], atol=1e-5, rtol=1e-5)


def test_a_killed_process_is_continued(tmp_path):
    """SIGKILL while the second shard is about to take its name; what the kill left is cleared."""
    child = os.fork()
    if child == 0:
        replace = os.replace

        def kill(source, target):
            if "00001-of" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = kill
        make(tmp_path / "out")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    names = sorted(p.name for p in (tmp_path / "out/data").iterdir())
    assert names[0].endswith(".tmp")
    assert names[1:] == ["latents-00000-of-00003.safetensors"]
    make(tmp_path / "out").verify()
    make(tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not list((tmp_path / "out/data").glob(".*.tmp"))


def test_a_damaged_shard_is_written_anew(tmp_path, caplog):
    make(tmp_path / "out")
    whole = contents(tmp_path / "out")
    first, second = (tmp_path / f"out/data/latents-0000{n}-of-00003.safetensors" for n in (0, 1))
    first.write_bytes(first.read_bytes()[:-100])
    flipped = bytearray(second.read_bytes())
    flipped[-5] ^= 1
    second.write_bytes(flipped)
    cache = TensorCache.open(tmp_path / "out", "latents")
    with pytest.raises(ValueError, match="00000-of-00003.*cannot be read.*Delete it and run the same"):
        cache[0]
    with pytest.raises(ValueError, match="00000-of-00003"):
        cache.verify()
    make(tmp_path / "out")
    assert "00000-of-00003.safetensors cannot be read" in caplog.text
    with pytest.raises(ValueError, match="00001-of-00003.*does not fit its checksum"):
        TensorCache.open(tmp_path / "out", "latents").verify()
    make(tmp_path / "out", verify=True)
    assert contents(tmp_path / "out") == whole


def test_a_full_disk_leaves_whole_shards(tmp_path, monkeypatch):
    write_shard, calls = write.write_shard, []

    def full(*args):
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(*args)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_shard", full)
        with pytest.raises(OSError, match="disk is full.*1 of 3 shards.*are whole") as info:
            make(tmp_path / "out")
    assert info.value.errno == errno.ENOSPC
    make(tmp_path / "out").verify()


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk", "48k") as disk:
        yield disk


def test_a_disk_that_is_really_full(small_disk):
    with pytest.raises(OSError, match="disk is full.*shards in.*are whole"):
        make(small_disk / "out")
    kept = list((small_disk / "out/data").iterdir())
    assert 1 <= len(kept) < 3
    assert all(load_file(path)["moments"].shape[0] == 4 for path in kept)
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    make(small_disk / "out").verify()
