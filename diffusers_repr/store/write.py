"""Writing a store: bounded memory, several processes, and a resume by the same call."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from diffusers_repr.hub import atomic_write, write_json
from diffusers_repr.hub.files import only_writer
from diffusers_repr.store.manifest import MANIFEST, recipe_differences
from diffusers_repr.store.processes import process_state
from diffusers_repr.store.progress import progress_bar
from diffusers_repr.store.shards import Layout, shard_problem, shard_recipe, write_shard
from diffusers_repr.store.store import Store

SHARD_BYTES = 256 * 2**20  # of a shard whose size nobody chose, at most
Spans = Sequence[tuple[int, int]]
StoreT = TypeVar("StoreT", bound=Store)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """One store to be written, the same on every process.

    Attributes:
        store: Its kind.
        out: Folder; new, empty, or of an earlier call with the same recipe.
        layout: How its rows lie in files.
        recipe: All that decides the values.
        rows: Gives the rows of the spans in turn, some at a time, by column; none of its batches lies in two spans.
        about: What the manifest tells without deciding anything.
        whole: Read shards that are there already, all of them; else their tables of contents alone.
        check_kept: Called with each shard that is kept; raises where the source has changed since.
        progress: Show a bar on the main process.
        what: What the bar says.
    """

    store: type[Store]
    out: Path
    layout: Layout
    recipe: dict[str, Any]
    rows: Callable[[Spans], Iterator[Mapping[str, Any]]]
    about: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = True
    check_kept: Callable[[int], None] | None = None
    progress: bool = True
    what: str = "rows"

    def write_manifest(self, complete: bool) -> dict[str, Any]:
        """Say in the folder what is or will be there."""
        manifest = self.store.manifest_of(self.layout, self.recipe, self.about, complete)
        write_json(self.out / MANIFEST, manifest)
        return manifest


def write_store(plan: Plan) -> None:
    """Write a store; the same call goes on where an earlier one was stopped.

    Under `accelerate launch` the processes share the shards. A shard holds fixed rows and depends on nothing but the
    recipe, so neither a kill nor the number of processes changes what is in it.

    Raises:
        FileExistsError: If the folder holds another recipe (tells what differs), or is no store of this kind.
        OSError: If the disk is full; what is written stays valid.
    """
    from accelerate.utils import gather_object

    state = process_state()
    with only_writer(plan.out, plan.store.command) if state.is_main_process else nullcontext():
        error: Exception | None = None
        if state.is_main_process:
            try:
                _prepare(plan)
            except (OSError, ValueError) as caught:
                error = caught
        errors = [text for text in gather_object([str(error) if error else None]) if text]
        if error is not None:
            raise error
        if errors:
            raise RuntimeError(f"Process 0 stopped: {errors[0]}")
        mine = range(state.process_index, plan.layout.shards, state.num_processes)
        todo = sorted(gather_object([shard for shard in mine if _is_to_do(plan, shard)]))
        _write_all(plan, todo[state.process_index :: state.num_processes], state)
        state.wait_for_everyone()
        if state.is_main_process:
            card = plan.store.card(plan.store.manifest_of(plan.layout, plan.recipe, plan.about, True))
            if card is not None:
                atomic_write(plan.out / "README.md", card)
            plan.write_manifest(True)
        state.wait_for_everyone()


def choose_shard_size(store: type[Store], out: Path, most: int, row_bytes: int, given: int | None) -> int:
    """Rows of a shard: those given, else what an earlier call chose, else at most `most` and 256 MiB.

    Args:
        store: Kind of the store.
        out: Its folder, which need not be there.
        most: Rows at most, where nobody chose.
        row_bytes: Bytes of one row.
        given: What the caller chose.

    Raises:
        ValueError: If `given` is below 1.
    """
    if given is not None:
        if given < 1:
            raise ValueError(f"shard_size must be at least 1, got {given}.")
        return given
    if (out / MANIFEST).is_file():
        return store.layout_of(store.read_manifest(out)).shard_size
    return max(1, min(most, SHARD_BYTES // row_bytes))


def check_folder(out: Path) -> None:
    """Raise FileExistsError for a file where a folder is wanted."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{str(out)!r} is a file; give a folder.")


# The folder


def _prepare(plan: Plan) -> None:
    """Refuse what is another's, clear what a kill left, say what will be here."""
    manifest = plan.store.read_manifest(plan.out) if (plan.out / MANIFEST).is_file() else None
    shards = sorted((plan.out / "data").glob(f"*.{plan.layout.suffix}"))
    if manifest is None:
        _check_ours(plan, shards)
    elif manifest["complete"] or shards:  # a run that ended before its first shard binds nobody
        _check_same(plan, manifest)
    for leftover in (plan.out / "data").glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    if manifest is None or any(not (plan.out / plan.layout.path(n)).is_file() for n in range(plan.layout.shards)):
        plan.write_manifest(False)


def _check_same(plan: Plan, manifest: dict[str, Any]) -> None:
    layout = plan.store.layout_of(manifest)
    old = {**manifest["recipe"], "shard_size": layout.shard_size}
    differences = recipe_differences(old, {**plan.recipe, "shard_size": plan.layout.shard_size})
    if not differences:  # what the recipe does not tell: other columns would be written over those that are there
        described = [plan.store.describe(one, plan.recipe, {}) for one in (layout, plan.layout)]
        differences = recipe_differences(*json.loads(json.dumps(described)))
    if differences:
        raise FileExistsError(
            f"{str(plan.out)!r} holds a {plan.store.noun} of another recipe; nothing was changed. "
            f"What differs (there -> now): {'; '.join(differences)}. Run the old command to finish it, or give "
            f"{plan.store.elsewhere}."
        )


def _check_ours(plan: Plan, shards: list[Path]) -> None:
    """A folder without a manifest: empty, or with shards of this very recipe."""
    ours = bool(shards) and all(shard_recipe(plan.layout, path) == plan.layout.recipe for path in shards)
    allowed = {"data", "README.md"} if ours else set()
    strangers = sorted(p.name for p in plan.out.iterdir() if p.name not in allowed and not p.name.startswith("."))
    if strangers:
        raise FileExistsError(
            f"{str(plan.out)!r} is not empty and is no {plan.store.noun} with this recipe (it holds "
            f"{', '.join(strangers[:8])}); nothing was changed. Give {plan.store.elsewhere}."
        )


def _is_to_do(plan: Plan, shard: int) -> bool:
    """Whether a shard is to be written; says so of one that is there but not whole."""
    problem = shard_problem(plan.out, plan.layout, shard, content=plan.whole)
    if problem is None:
        if plan.check_kept is not None:
            plan.check_kept(shard)
        return False
    if problem != "is missing":
        _logger.warning("%s %s; it is written anew.", plan.layout.path(shard), problem)
    return True


# The work


def _write_all(plan: Plan, todo: Sequence[int], state: Any) -> None:
    spans = [plan.layout.span(shard) for shard in todo]
    what = plan.what if state.num_processes == 1 else f"{plan.what} (1 of {state.num_processes} processes)"
    total = sum(stop - start for start, stop in spans)
    batches = plan.rows(spans)
    silent = not (plan.progress and state.is_main_process and todo)
    with progress_bar(total, what, "image", shown=not silent) as bar:
        for shard, (start, stop) in zip(todo, spans, strict=True):
            try:
                _write_one(plan, shard, batches, stop - start, bar)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                done = sum((plan.out / plan.layout.path(n)).is_file() for n in range(plan.layout.shards))
                raise OSError(
                    error.errno,
                    f"The disk is full while {plan.layout.path(shard)} is written. {done} of {plan.layout.shards} "
                    f"shards in {str(plan.out)!r} are whole and stay. Free space, then run the same command again",
                ) from error


def _write_one(plan: Plan, shard: int, batches: Iterator[Mapping[str, Any]], rows: int, bar: Any) -> None:
    with write_shard(plan.out, plan.layout, shard) as append:
        while rows > 0:
            batch = next(batches, None)
            if batch is None:
                raise RuntimeError(f"The rows ended {rows} before the end of {plan.layout.path(shard)}.")
            append(batch)
            count = len(next(iter(batch.values())))
            rows -= count
            bar.update(count)
