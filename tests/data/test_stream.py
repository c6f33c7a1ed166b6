"""Streams: shared among processes, shuffled, and resumed at the very next sample wherever they were stopped."""

import itertools
import json
import logging

import datasets
import pytest
import torch
from datasets import Dataset, Features
from torch.utils.data import DataLoader

from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.image_files import UnreadableImage
from diffusers_repr.data.loading import load_train_data
from diffusers_repr.data.stream import StreamData
from tests.data.data_cases import NAMES, rows, with_broken
from tests.testers.cases import pairs, slow

COUNT = 23


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def source(kind, tmp_path):
    """The same rows, `text` telling which, by another of the ways that `datasets` reads."""
    data = rows(COUNT, captions=True)
    if kind == "memory":
        return data.to_iterable_dataset(num_shards=4)
    if kind == "generator":
        return datasets.IterableDataset.from_generator(
            lambda shard: (data[i] for s in shard for i in range(s, COUNT, 3)),
            gen_kwargs={"shard": [0, 1, 2]},
            features=data.features,
        )
    for shard in range(3):
        path = tmp_path / "parquet" / f"train-{shard}.parquet"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            data.shard(3, shard).to_parquet(path)
    return datasets.load_dataset(str(tmp_path / "parquet"), streaming=True, split="train")


def stream(data, seed=0, rank=0, world_size=1, threads=0, **settings):
    config = DataConfig(**{"caption_column": "text", "shuffle_buffer": 5, **settings})
    return load_train_data(config, 3, 8, data, seed=seed, rank=rank, world_size=world_size, num_workers=threads)


def told(samples):
    return [(sample["caption"], int(sample["index"])) for sample in samples]


def numbers(samples):
    return [int(sample["caption"].split()[1]) for sample in samples]


@pytest.mark.parametrize(
    ("kind", "threads"),
    pairs(("memory", "generator", "parquet"), (0, 2), ("memory", 2), ("generator", 0), ("parquet", 0)),
)
def test_resumes_at_the_next_sample_wherever_it_stopped(tmp_path, kind, threads):
    settings = {"threads": threads}
    whole, states, data = [], [], source(kind, tmp_path)
    reading = stream(data, **settings)
    states.append(json.dumps(reading.state_dict()))
    for sample in itertools.islice(reading, 2 * COUNT + 7):
        whole.append(sample)
        states.append(json.dumps(reading.state_dict()))
    assert sorted(numbers(whole[:COUNT])) == sorted(numbers(whole[COUNT : 2 * COUNT])) == list(range(COUNT))
    for stop in range(0, 2 * COUNT + 2, 1 if threads == 0 else 5):
        again = stream(data, **settings)
        again.load_state_dict(json.loads(states[stop]))
        following = list(itertools.islice(again, 5))
        assert told(following) == told(whole[stop : stop + 5]), stop
        assert torch.equal(following[0]["pixel_values"], whole[stop]["pixel_values"])


def test_a_stopped_reading_goes_on_by_itself(tmp_path):
    reading = stream(source("memory", tmp_path))
    whole = told(itertools.islice(stream(source("memory", tmp_path)), 12))
    assert told(itertools.islice(reading, 7)) + told(itertools.islice(reading, 5)) == whole
    reading.fingerprint()
    state = reading.state_dict()
    assert told(itertools.islice(reading, 3)) == told(
        itertools.islice(_loaded(stream(source("memory", tmp_path)), state), 3)
    )


def _loaded(data, state):
    data.load_state_dict(state)
    return data


def test_order_depends_on_seed_and_epoch(tmp_path):
    first = numbers(itertools.islice(stream(source("memory", tmp_path)), 2 * COUNT))
    assert first == numbers(itertools.islice(stream(source("memory", tmp_path)), 2 * COUNT))
    assert first[:COUNT] != first[COUNT:] != list(range(COUNT))
    assert first != numbers(itertools.islice(stream(source("memory", tmp_path), seed=1), 2 * COUNT))
    # shards are shuffled too: the first block is not always of the first rows
    starts = {min(numbers(itertools.islice(stream(source("memory", tmp_path), seed=s), 5))) // 6 for s in range(8)}
    assert len(starts) > 1


@pytest.mark.parametrize(("kind", "world_size"), [("memory", 2), ("memory", 3), slow("parquet", 3)])
def test_processes_share_the_rows(tmp_path, kind, world_size):
    """4 shards for 2 processes are divided; 4 for 3 are not, so each takes every third row."""
    shared, indices = [], []
    for rank in range(world_size):
        reading = stream(source(kind, tmp_path), rank=rank, world_size=world_size)
        samples = []
        for sample in reading:
            samples.append(sample)
            if reading.state_dict()["epoch"] or len(samples) == COUNT // world_size - 1:
                break
        shared += numbers(samples)
        indices += [int(sample["index"]) for sample in samples]
        again = stream(source(kind, tmp_path), rank=rank, world_size=world_size)
        for _ in zip(range(3), again, strict=False):
            pass
        resumed = _loaded(stream(source(kind, tmp_path), rank=rank, world_size=world_size), again.state_dict())
        assert told(itertools.islice(resumed, 2)) == told(samples[3:5])
    assert len(set(shared)) == len(shared)
    assert len(shared) >= COUNT - 2 * world_size
    assert len(set(indices)) == len(indices)


def test_batches_by_a_loader(tmp_path):
    reading = stream(source("memory", tmp_path))
    batches = iter(DataLoader(reading, batch_size=4))
    first = next(batches)
    state = reading.state_dict()  # nothing was read ahead of the batch
    assert state["count"] == 4
    assert first["pixel_values"].shape == (4, 3, 8, 8)
    assert first["class_labels"].tolist() == [n % 3 for n in numbers([{"caption": c} for c in first["caption"]])]
    resumed = iter(DataLoader(_loaded(stream(source("memory", tmp_path)), state), batch_size=4))
    assert next(resumed)["caption"] == next(batches)["caption"]
    out = reading.on_device(first)["pixel_values"]
    assert out.dtype == torch.float32
    assert (reading.num_classes, reading.class_names) == (3, NAMES)
    with pytest.raises(RuntimeError, match="num_workers=0"):
        next(iter(DataLoader(reading, batch_size=4, num_workers=1)))


def test_bad_images(caplog, tmp_path):
    data = with_broken(rows(COUNT, captions=True), [0, 5, 6])
    with pytest.raises(UnreadableImage, match=r"row \d+ \(photo\d.png\) cannot be read.*--bad_images skip"):
        list(itertools.islice(stream(data.to_iterable_dataset()), COUNT))
    reading = stream(data.to_iterable_dataset(), bad_images="skip")
    with caplog.at_level(logging.WARNING):
        whole = list(itertools.islice(reading, 20))
    assert sorted(numbers(whole)) == [i for i in range(COUNT) if i not in (0, 5, 6)]
    assert reading.bad == 3
    assert sum("skipped" in record.message for record in caplog.records) == 3
    states = stream(data.to_iterable_dataset(), bad_images="skip")
    for count, _ in enumerate(states, 1):
        if count == 9:
            break
    resumed = _loaded(stream(data.to_iterable_dataset(), bad_images="skip"), states.state_dict())
    assert told(itertools.islice(resumed, 4)) == told(whole[9:13])


def test_fingerprint(tmp_path):
    reading = stream(source("parquet", tmp_path))
    assert reading.fingerprint() == stream(source("parquet", tmp_path), seed=4).fingerprint()
    assert reading.fingerprint() != stream(source("parquet", tmp_path), center_crop="fit").fingerprint()
    assert reading.fingerprint() != stream(source("memory", tmp_path)).fingerprint()


def test_opened_by_name(tmp_path):
    source("parquet", tmp_path)
    config = DataConfig(dataset_name=str(tmp_path / "parquet"), streaming=True, shuffle_buffer=5)
    reading = load_train_data(config, 3, 8)
    assert isinstance(reading, StreamData)
    assert next(iter(reading))["pixel_values"].shape == (3, 8, 8)


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="shuffled already"):
        stream(source("memory", tmp_path).shuffle(seed=0, buffer_size=3))
    with pytest.raises(ValueError, match="rank=2 is no process"):
        stream(source("memory", tmp_path), rank=2, world_size=2)
    reading = stream(source("memory", tmp_path))
    with pytest.raises(ValueError, match="another run .*seed 0 -> 1"):
        stream(source("memory", tmp_path), seed=1).load_state_dict(reading.state_dict())
    with pytest.raises(ValueError, match="no column 'photo'"):
        stream(source("memory", tmp_path), image_column="photo")
    two = rows(2, captions=True).to_iterable_dataset()
    with pytest.raises(ValueError, match="no rows for process 2 of 3"):
        next(iter(stream(two, rank=2, world_size=3)))
    plain = Dataset.from_dict(
        {"image": rows(2)["image"], "label": [0, 1]},
        features=Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    with pytest.raises(ValueError, match="whole numbers; how many classes"):
        stream(plain.to_iterable_dataset(), caption_column=None)
    without = stream(plain.to_iterable_dataset(), caption_column=None, label_column="none")
    assert "class_labels" not in next(iter(without))


def test_missing_labels():
    data = rows(4, captions=True).to_list()
    data[2]["label"] = None
    data = Dataset.from_list(data, features=rows(1, captions=True).features)
    with pytest.raises(ValueError, match="has the class None in 'label'"):
        list(itertools.islice(stream(data.to_iterable_dataset()), 4))
    kept = list(itertools.islice(stream(data.to_iterable_dataset(), missing_labels="keep"), 4))
    assert sorted(int(sample["class_labels"]) for sample in kept) == [-1, 0, 0, 1]
