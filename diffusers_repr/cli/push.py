"""`diffusers-repr push FOLDER user/name`: push a task, a store, a pipeline or a model to the Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from diffusers_repr.config.recipe import REQUIRED, setting

if TYPE_CHECKING:
    from diffusers_repr.hub.upload import Upload


TASKS = (  # kinds that name a base
    "probe",
    "segmenter",
    "open-vocabulary segmenter",
    "matcher",
    "zero-shot classifier",
    "representation probe",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    POSITIONAL: ClassVar = ("folder", "repo_id")

    folder: str = setting(
        REQUIRED, "a probe, segmenter or matcher, a store, a pipeline, a custom pipeline, a model or a head"
    )
    repo_id: str = setting(REQUIRED, "user/name")
    repo_type: Literal["auto", "model", "dataset"] = setting("auto", "of the repository; told by the folder")
    dry_run: bool = setting(False, "check all, list the files and sizes, send nothing")
    private: bool = setting(False, "make the repository private if it is new")
    revision: str | None = setting(None, "branch to push to")
    message: str | None = setting(None, "first line of the commit")
    base: str | None = setting(None, "of a task: Hub id to write as its base, where that was a folder")
    base_revision: str | None = setting(None, "branch, tag or commit of --base")
    clip: str | None = setting(None, "of an open-vocabulary segmenter: Hub id to write as its CLIP")


def run(args: Settings) -> int:
    """Push and print the commit's address."""
    from diffusers_repr.hub import push_folder

    kind, repo_type = what_is(args.folder)
    if args.repo_type not in ("auto", repo_type):
        raise ValueError(f"{args.folder!r} is a {kind}, which goes to a {repo_type} repository, not {args.repo_type}.")
    if args.base is not None and kind not in TASKS:
        raise ValueError(f"--base is for {' and '.join(f'{task}s' for task in TASKS)}; {args.folder!r} is a {kind}.")
    if args.clip is not None and kind != "open-vocabulary segmenter":
        raise ValueError(f"--clip is for open-vocabulary segmenters; {args.folder!r} is a {kind}.")
    options: dict[str, Any] = {
        "private": args.private,
        "revision": args.revision,
        "commit_message": args.message or f"Upload {kind} with diffusers-repr",
        "dry_run": args.dry_run,
        "report": lambda upload: _report(upload, args.dry_run),
    }
    if kind == "representation probe":
        from diffusers_repr.tasks.representation_files import push

        address = push(Path(args.folder), args.repo_id, args.base, args.base_revision, **options)
    elif kind in TASKS:
        from diffusers_repr.tasks.files import push_saved

        address = push_saved(args.folder, args.repo_id, args.base, args.base_revision, args.clip, **options)
    else:
        _check(args.folder, kind)
        address = push_folder(args.folder, args.repo_id, kind=kind, repo_type=repo_type, **options)
    print(f"Pushed the {kind} to {address}" if not args.dry_run else "Nothing was sent.")
    return 0


def _check(folder: str, kind: str) -> None:
    """That what is pushed can be loaded again."""
    if kind.startswith("store of "):
        from diffusers_repr.store import STORES

        STORES[kind].open(folder).verify()
    code = Path(folder) / "pipeline.py"
    if kind in ("custom pipeline", "pipeline") and code.is_file():
        from diffusers_repr.hub import check_pipeline_file

        check_pipeline_file(code)


def _report(upload: Upload, files: bool) -> None:
    for line in [*(upload.listing() if files else []), upload.left_out_line()]:
        if line is not None:
            print(line)


def what_is(folder: str) -> tuple[str, str]:
    """What a folder holds, and the type of repository it goes to.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If it is a file.
        ValueError: If it is none of `diffusers_repr.hub.allowed.KINDS`.
    """
    from diffusers_repr.hub.allowed import KINDS, kind_of

    path = Path(folder)
    if path.is_file():
        raise NotADirectoryError(f"{folder!r} is a file; give the folder that holds what is to be pushed.")
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {folder!r}.")
    kind = kind_of(path)
    return kind, KINDS[kind].repo_type
