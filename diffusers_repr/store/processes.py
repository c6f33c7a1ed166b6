"""The processes that share a piece of work, as `accelerate launch` started them."""

from __future__ import annotations

import os
from typing import Any

import torch


def process_state() -> Any:
    """This process among those of `accelerate launch`, on the CPU where there is no accelerator.

    Raises:
        RuntimeError: If several processes were launched but do not know each other.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without cpu=True, processes launched on a machine without accelerator would each do all the work.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != state.num_processes:
        raise RuntimeError(f"{launched} processes were launched, but accelerate sees {state.num_processes}.")
    return state
