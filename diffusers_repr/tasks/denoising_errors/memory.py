"""Batches that shrink where memory does not suffice."""

from __future__ import annotations

import warnings

import torch


def smaller_batch(size: int, error: BaseException, what: str) -> int:
    """Half a batch, after it was too large for the memory; a warning says so.

    Args:
        size: Of the batch that failed.
        error: How it failed.
        what: Was batched, for the warning.

    Raises:
        BaseException: `error` itself, if it tells of something else.
        MemoryError: If the batch was one row.
    """
    if not _is_memory(error):
        raise error
    if size == 1:
        raise MemoryError(
            f"Memory does not suffice for one of the {what}. Take a smaller dtype or image size, fewer prompts, or "
            "offload the model."
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    half = (size + 1) // 2
    warnings.warn(f"Memory does not suffice for {size} {what}; going on with {half}.", stacklevel=4)
    return half


def _is_memory(error: BaseException) -> bool:
    """Whether memory was lacking; that of the CPU comes as a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


__all__ = ["smaller_batch"]
