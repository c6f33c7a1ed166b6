"""`diffusers-repr push FOLDER user/name`: push a probe, a store, a pipeline or a model to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers_repr.hub.upload import Upload


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "folder",
        help="a probe, a store, a pipeline, a custom pipeline, a model or a head",
    )
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--repo_type", choices=("auto", "model", "dataset"), default="auto")
    parser.add_argument("--dry_run", action="store_true", help="check all, list the files and sizes, send nothing")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--base", help="of a probe: Hub id to write as its base model, where that was a folder")
    parser.add_argument("--base_revision", help="branch, tag or commit of --base")


def run(args: argparse.Namespace) -> int:
    """Push and print the commit's address."""
    from diffusers_repr.hub import push_folder

    kind, repo_type = what_is(args.folder)
    if args.repo_type not in ("auto", repo_type):
        raise ValueError(f"{args.folder!r} is a {kind}, which goes to a {repo_type} repository, not {args.repo_type}.")
    if args.base is not None and kind != "probe":
        raise ValueError(f"--base is for probes; {args.folder!r} is a {kind}.")
    options = {
        "private": args.private,
        "revision": args.revision,
        "commit_message": args.message or f"Upload {kind} with diffusers-repr",
        "dry_run": args.dry_run,
        "report": lambda upload: _report(upload, args.dry_run),
    }
    if kind == "probe":
        from diffusers_repr.tasks.probe_files import push_saved

        address = push_saved(args.folder, args.repo_id, args.base, args.base_revision, **options)
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
