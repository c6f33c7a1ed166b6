"""A protocol of gradient steps as settings of the training loop, for heads whose features are not computed once."""

from __future__ import annotations

from typing import Any

from diffusers_repr.heads.fitting.protocols import MinibatchProtocol

_OPTIMIZERS = {"adam": "adamw", "sgd": "sgd"}  # without weight decay Adam and AdamW are one
_SCHEDULES = {"cosine_step": "cosine", "constant": "constant", "step_epoch": "piecewise_constant"}


def loop_settings(protocol: MinibatchProtocol, rows: int, micro_batches: int = 1) -> dict[str, Any]:
    """The fields of `TrainingConfig` that make the loop take a protocol's steps.

    Rates are those of `protocol_rate`, step by step; only a warm-up begins one step further on, since the loop's first
    step trains already. No gradient is clipped, and what is saved are the weights of the last step.

    Args:
        protocol: How a head is fitted.
        rows: Images of the training data.
        micro_batches: Processes, times micro-batches of a step: they share the protocol's batch.

    Raises:
        ValueError: If the loop cannot do what the protocol says, or the batch does not divide.

    Example:
        >>> from diffusers_repr.heads.fitting.protocols import PROTOCOLS
        >>> found = loop_settings(PROTOCOLS["gdc"], rows=1280)
        >>> found["max_train_steps"], found["optimizer"], found["lr_step_rules"]
        (280, 'sgd', '1:70,0.1:140,0.01:210,0.001')
    """
    if protocol.optimizer not in _OPTIMIZERS or protocol.schedule not in _SCHEDULES or protocol.weight_decay:
        raise ValueError(
            f"Protocol {protocol.name!r} ({protocol.optimizer}, {protocol.schedule}, weight decay "
            f"{protocol.weight_decay:g}) is for features that are computed once; the training loop takes adam and sgd "
            f"without weight decay, with {', '.join(_SCHEDULES)}. Take one of these, such as 'gdc', or none and the "
            "settings of the loop."
        )
    size = min(protocol.batch_size, rows)
    if size % micro_batches:
        raise ValueError(
            f"Protocol {protocol.name!r} has batches of {size}, which {micro_batches} processes and micro-batches "
            "cannot share; change their number."
        )
    each = -(-rows // size)
    rate = protocol.learning_rate * (size / 256 if protocol.rate_per_256 else 1)
    found: dict[str, Any] = {
        "optimizer": _OPTIMIZERS[protocol.optimizer],
        "learning_rate": rate,
        "lr_scheduler": _SCHEDULES[protocol.schedule],
        "lr_warmup_steps": protocol.warmup_epochs * each,
        "lr_step_rules": None,
        "sgd_momentum": protocol.momentum if protocol.optimizer == "sgd" else 0.0,
        "adam_weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "ema_max_decay": 0.0,
        "train_batch_size": size // micro_batches,
        "max_train_steps": protocol.epochs * each,
    }
    if protocol.schedule == "step_epoch":
        drops = range(1, -(-protocol.epochs // protocol.step_epochs))
        parts = [f"{protocol.step_factor ** (drop - 1):g}:{drop * protocol.step_epochs * each}" for drop in drops]
        last = f"{protocol.step_factor ** len(parts):g}"
        found["lr_step_rules"] = ",".join([*parts, last]) if parts else None
        found["lr_scheduler"] = "piecewise_constant" if parts else "constant"
    return found


__all__ = ["loop_settings"]
