"""`StreamData`: images read as they are used, shuffled, split by process, and resumed at the very next sample."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import IterableDataset, get_worker_info

from diffusers_repr.data.base import augmented, geometry, hashed
from diffusers_repr.data.config import DataConfig
from diffusers_repr.data.image_files import UnreadableImage, raw_bytes
from diffusers_repr.data.label_column import class_names
from diffusers_repr.data.samples import SampleReader, TensorReader
from diffusers_repr.hub.schema import anything, integer, mapping, optional, record

MAX_BAD_IN_A_ROW = 100
_AHEAD = 4  # images a thread may be ahead of the consumer
_logger = logging.getLogger(__name__)
_COUNT = integer(0, 10**15)
_PLACE = record(
    {"epoch": _COUNT, "block": _COUNT, "at": _COUNT, "count": _COUNT, "source": optional(mapping(anything()))},
    others=True,
)


class StreamData(IterableDataset):
    """An endless stream of samples as `ImageTrainData` has them, from a `datasets.IterableDataset`.

    Each epoch reads the shards in another order. `config.shuffle_buffer` rows at a time are then shuffled as a
    block; a place in the stream is the source's own state at the start of a block and a place in the block, so a
    resumed stream reads one block again and goes on with the very next sample, which a rolling buffer cannot.

    It runs in the training process: `torch.utils.data.DataLoader` must have `num_workers=0`, for a worker that reads
    ahead would tell a place that training has not come to. `threads` decode images beside it.

    Args:
        dataset: Not shuffled; it is shuffled here.
        config: See `DataConfig`.
        channels: 1 (grey) or 3 (RGB).
        size: (H, W) of the pixels.
        seed: Of the order.
        rank: This process; the processes share the rows, whole shards where their number is divisible.
        world_size: Number of processes.
        threads: That decode images ahead of the training; 0: it waits for each.
        name: For messages.

    Attributes:
        config: As given.
        columns: Which columns are read.
        masks: Names of the classes of pixels; None without masks.
        bad: Number of images skipped in this process.

    Raises:
        ValueError: For columns that are not there or hold something else, or a stream that is shuffled already.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        config: DataConfig,
        channels: int,
        size: tuple[int, int],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 0,
        name: str = "the stream",
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is no process of world_size={world_size}.")
        if _is_shuffled(dataset):
            raise ValueError(
                f"{name} is shuffled already, and a shuffle buffer cannot be resumed; pass it unshuffled, it is "
                "shuffled here (shuffle_buffer, seed)."
            )
        if dataset.features is None:
            # Private: what `datasets` itself calls to learn columns from the first rows. If it goes, a stream whose
            # files name no types must be given its features (`cast`).
            dataset = dataset._resolve_features()
        features = dict(dataset.features)
        self.columns, self.masks = config.columns(features, name), config.masks(features)
        self._names = None if self.columns.label is None else _names_of(features, self.columns.label, name)
        rows = SampleReader(features, self.columns, self.masks)
        self._reader = TensorReader(rows, channels, size, config.center_crop, config.max_points or 1)
        self._whole = rows.undecoded(dataset.select_columns(self.columns.used()))
        part = split_dataset_by_node(self._whole, rank, world_size) if world_size > 1 else self._whole
        self._source = _with_shuffled_shards(part)
        self.config, self.bad = config, 0
        self._seed, self._rank, self._world_size, self._title = seed, rank, world_size, name
        self._threads = threads
        # The place of the next sample: epoch, the source's state where its block starts, number and place of the block
        self._epoch, self._block, self._at = 0, 0, 0
        self._start: dict[str, Any] | None = None
        self._count = 0
        self._fingerprint: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if get_worker_info() is not None:
            raise RuntimeError(
                "A stream is read in the training process; pass num_workers=0 to DataLoader. Threads of its "
                "own decode images (dataloader_num_workers of a run)."
            )
        in_a_row = 0
        for place, sample in self._decoded():
            self._epoch, self._start, self._block, self._at = place
            if isinstance(sample, UnreadableImage):
                in_a_row += 1
                self._report(sample, in_a_row)
                continue
            in_a_row = 0
            sample["index"] = torch.tensor(self._count * self._world_size + self._rank)
            self._count += 1
            yield sample

    def state_dict(self) -> dict[str, Any]:
        """The place after the last sample given, as JSON."""
        return {
            "epoch": self._epoch,
            "source": self._start,
            "block": self._block,
            "at": self._at,
            "count": self._count,
            **self._setting(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; takes effect at the next `iter`.

        Raises:
            ValueError: If it was taken with another seed, shuffle buffer, rank or number of processes, or is no place.
        """
        _PLACE(state, "the place in the stream")
        differs = {k: (state.get(k), v) for k, v in self._setting().items() if state.get(k) != v}
        if differs:
            changes = ", ".join(f"{key} {old} -> {new}" for key, (old, new) in differs.items())
            raise ValueError(f"The place in the stream is of another run ({changes}); run with the same settings.")
        self._epoch, self._block, self._at = int(state["epoch"]), int(state["block"]), int(state["at"])
        self._start, self._count = state["source"], int(state["count"])

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """As `TrainData.on_device`."""
        return augmented(batch, self.config)

    def fingerprint(self) -> dict[str, Any]:
        """As `TrainData.fingerprint`: the number of shards and the first image stand for the data."""
        if self._fingerprint is None:
            first = next(iter(self._whole.take(1)), None)  # a reading of its own leaves the run's place alone
            if first is None:
                raise ValueError(f"{self._title} has no rows.")
            self._fingerprint = {
                "shards": self._whole.num_shards,
                "images": hashed([raw_bytes(first[self.columns.image])]),
                "classes": self._names,
                "captions": self.config.caption_column,
                **geometry(self.config, self._reader.channels, self._reader.size),
            }
            for kind, column in (("masks", self.columns.mask), ("points", self.columns.points)):
                if column is not None:
                    self._fingerprint[kind] = hashed([raw_bytes(first[column])])
        return dict(self._fingerprint)

    @property
    def class_names(self) -> list[str] | None:
        """Name of each class id; None without labels."""
        return self._names

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self._names is None else len(self._names)

    def _setting(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "shuffle_buffer": self.config.shuffle_buffer,
            "rank": self._rank,
            "world_size": self._world_size,
        }

    def _report(self, error: UnreadableImage, in_a_row: int) -> None:
        if self.config.bad_images == "error":
            raise UnreadableImage(f"{error} Repair or drop it, or pass --bad_images skip.") from error
        self.bad += 1
        _logger.warning("%s It is skipped (%d so far in this process).", error, self.bad)
        if in_a_row >= MAX_BAD_IN_A_ROW:
            raise UnreadableImage(f"{in_a_row} images in a row cannot be read; the last: {error}") from error

    def _rows(self) -> Iterator[tuple[tuple[int, Any, int, int], int, dict[str, Any]]]:
        """`(place after it, number of the row, row)` of every row from the present place on, without end."""
        epoch, start, block, at = self._epoch, self._start, self._block, self._at
        size = self.config.shuffle_buffer
        while True:
            self._source.set_epoch(_source_epoch(self._seed, epoch))
            # The empty state is the beginning; None given, the source would go on from the state it was given before
            self._source.load_state_dict({} if start is None else start)
            reading = iter(self._source)
            while rows := list(itertools.islice(reading, size)):
                following = self._source.state_dict()
                order = np.random.default_rng((self._seed, epoch, self._rank, block)).permutation(len(rows))
                for place in range(at, len(rows)):
                    number = block * size + int(order[place])
                    last = place + 1 == len(rows)
                    after = (epoch, following, block + 1, 0) if last else (epoch, start, block, place + 1)
                    yield after, number, rows[int(order[place])]
                start, block, at = following, block + 1, 0
            if block == 0:
                raise ValueError(
                    f"{self._title} has no rows for process {self._rank} of {self._world_size}; use fewer processes."
                )
            epoch, start, block, at = epoch + 1, None, 0, 0

    def _decoded(self) -> Iterator[tuple[tuple[int, Any, int, int], dict[str, Any] | UnreadableImage]]:
        """`(place after it, sample)` in order, decoded by threads that run ahead."""
        threads = self._threads
        if threads == 0:
            for place, number, row in self._rows():
                yield place, self._sample(number, row)
            return
        waiting: list[tuple[Any, Future[Any]]] = []
        with ThreadPoolExecutor(threads) as pool:
            try:
                for place, number, row in self._rows():
                    waiting.append((place, pool.submit(self._sample, number, row)))
                    if len(waiting) >= threads * _AHEAD:
                        done, future = waiting.pop(0)
                        yield done, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def _sample(self, number: int, row: Mapping[str, Any]) -> dict[str, Any] | UnreadableImage:
        try:
            sample: dict[str, Any] = dict(self._reader.read(row, number))
        except UnreadableImage as error:
            return error
        if self.columns.label is not None:
            sample["class_labels"] = torch.tensor(self._label(row[self.columns.label], number))
        if self.columns.caption is not None:
            sample["caption"] = row[self.columns.caption] or ""
        return sample

    def _label(self, value: int | None, number: int) -> int:
        label = -1 if value is None else int(value)
        if label == -1 and self.config.missing_labels == "keep":
            return label
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"Row {number} of the stream has the class {value} in {self.columns.label!r}, which has "
                f"{self.num_classes} classes; leave it out, pass --missing_labels keep for rows without a class, or "
                "--label_column none to train without labels."
            )
        return label


def _names_of(features: Mapping[str, Any], column: str, name: str) -> list[str]:
    names = class_names(features[column])
    if not names:
        raise ValueError(
            f"Column {column!r} of {name} holds whole numbers; how many classes there are is not known before a "
            "stream was read. Cast it to a ClassLabel, or pass --label_column none."
        )
    return names


def _source_epoch(seed: int, epoch: int) -> int:
    """A number from 1 that `datasets` shuffles the shards by; 0 would leave them in order."""
    return 1 + int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])


def _with_shuffled_shards(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    """The stream, whose `set_epoch` shuffles the shards; datasets 5.2 does so by itself, 5.0 does not."""
    # Private: the mark by which older versions shuffle them; `shuffle` sets it and adds a buffer, which cannot resume.
    if not hasattr(dataset, "_shuffling"):
        return dataset
    shuffled = copy.copy(dataset)
    shuffled._shuffling = dataset.shuffle(seed=0)._shuffling
    return shuffled


def _is_shuffled(dataset: datasets.IterableDataset) -> bool:
    """Whether a shuffle buffer lies anywhere in the chain that `datasets` reads through."""
    # Private: `datasets` does not say that it shuffles. If the names change, such a stream is taken, and a resumed run
    # does not see the samples that the first would have.
    link = getattr(dataset, "_ex_iterable", None)
    while link is not None:
        if type(link).__name__ == "BufferShuffledExamplesIterable":
            return True
        link = getattr(link, "ex_iterable", None)
    return False
