"""FSDP2 under accelerate: what must be there, and what is set so that sharded runs compute what others do."""

from __future__ import annotations

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy

from diffusers_repr.objectives import Objective


def check_sharding(accelerator: Accelerator) -> None:
    """FSDP that was asked for must be there.

    Raises:
        RuntimeError: If accelerate wraps by DDP instead, as it does without GPUs, or if it is FSDP1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes", "y", "on"):
        if accelerator.distributed_type != DistributedType.FSDP:
            raise RuntimeError(
                f"FSDP was asked for, and accelerate gave {accelerator.distributed_type.value} on "
                f"{accelerator.device.type}: it shards on GPUs only, with several processes. Drop --use_fsdp."
            )
        if not accelerator.is_fsdp2:
            raise RuntimeError("Only FSDP2 is supported; pass --fsdp_version 2 to accelerate launch.")


def prepare_sharding(objective: Objective, accelerator: Accelerator) -> None:
    """Before `accelerator.prepare`; does nothing without FSDP2.

    FSDP2 finds the blocks that the networks name (`_no_split_modules`), and leaves mixed precision to autocast, as
    everywhere else: its own policy would round noise, targets and times of a batch to half precision.
    """
    if not accelerator.is_fsdp2:
        return
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    objective._no_split_modules = block_classes(objective)  # type: ignore[assignment]


def block_classes(objective: Objective) -> list[str]:
    """Names of the classes that the networks in an objective want whole, of those they have."""
    # Private in diffusers and transformers, and what accelerate goes by; without it FSDP does not shard by blocks.
    wanted = {name for module in objective.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return sorted(wanted & {type(module).__name__ for module in objective.modules()})
