"""Micro-batches of a run from any step on, on the device, from map-style data or a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset

from diffusers_repr.objectives import Objective
from diffusers_repr.training.config import TrainingConfig
from diffusers_repr.training.order import batch_indices, epoch_indices


def make_batches(
    data: Any, config: TrainingConfig, accelerator: Accelerator, step: int, streams: Any, objective: Objective
) -> Iterator[dict[str, Any]]:
    """Micro-batches of this process from `step` on, without end.

    The samples of a step lie side by side over micro-batches and processes.

    Args:
        data: A `TrainData`, or a `StreamData`.
        config: For the batch size.
        accelerator: The run's.
        step: Optimizer steps done.
        streams: Of a stream: the place of each process in it, as `gather_streams` gave it; None starts anew.
        objective: Checks each batch.
    """
    micro, everyone = config.train_batch_size, config.train_batch_size * accelerator.num_processes
    pinned = accelerator.device.type == "cuda"
    loader: Any
    if isinstance(data, IterableDataset):
        if streams:
            if not isinstance(streams, list) or len(streams) != accelerator.num_processes:
                raise ValueError(
                    f"The checkpoint does not hold the place of {accelerator.num_processes} processes in their "
                    "streams; go on with as many processes as it was written by."
                )
            data.load_state_dict(streams[accelerator.process_index])  # type: ignore[attr-defined]
        loader = DataLoader(data, batch_size=micro, num_workers=0, pin_memory=pinned)
    else:
        first = step * everyone * config.gradient_accumulation_steps + accelerator.process_index * micro
        places = epoch_indices if getattr(data, "by_epoch", False) else batch_indices
        order: Any = places(len(data), config.seed, first, micro, stride=everyone)
        if hasattr(data, "batch"):  # gives whole batches from memory
            loader = (data.batch(indices) for indices in order)
        else:
            workers = config.dataloader_num_workers
            loader = DataLoader(data, batch_sampler=order, num_workers=workers, pin_memory=pinned)
    for batch in loader:
        objective.check_batch(batch)
        yield {k: to_device(v, accelerator.device) for k, v in batch.items()}


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors, and mappings of them, on the device; the rest as it is."""
    if isinstance(value, torch.Tensor):
        # From memory that is not pinned a copy waits for all that the GPU has been given to do.
        value = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


def gather_streams(data: Any, accelerator: Accelerator) -> list[Any] | None:
    """The place of each process in its stream; None for map-style data, whose place is the step."""
    if not isinstance(data, IterableDataset):
        return None
    mine = data.state_dict()  # type: ignore[attr-defined]
    if accelerator.num_processes == 1:
        return [mine]
    places: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(places, mine)
    return json.loads(json.dumps(places))
