"""The latent cache stopped and damaged: it goes on; what every store does is in `tests/store/test_write.py`."""

import datasets
import pytest
import torch

from diffusers_repr.store import write
from diffusers_repr.store.tensor_cache import TensorCache
from tests.data.latent_cases import ROWS, contents, make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_goes_on_with_another_batch_size(tmp_path, monkeypatch):
    """What is computed anew differs by rounding alone."""
    whole = make(tmp_path / "whole")
    write_shard = write.write_shard

    def interrupted(folder, layout, shard):
        if shard == 1:
            raise KeyboardInterrupt
        return write_shard(folder, layout, shard)

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_shard", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    with pytest.raises(ValueError, match="not finished: 4 of 11 rows .1 of 3 shards.*keeps whole"):
        TensorCache.open(tmp_path / "out", "latents")
    cache = make(tmp_path / "out", batch_size=1)
    for row in range(ROWS):
        torch.testing.assert_close(cache[row], whole[row], atol=1e-5, rtol=1e-5)


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
