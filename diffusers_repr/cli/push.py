"""`diffusers-repr push FOLDER user/name`: push a probe, a feature store or a pipeline to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

KINDS = {  # the file that tells what a folder is, first found first; and the type of its repository
    "probe.json": ("probe", "model"),
    "manifest.json": ("store of features", "dataset"),
    "pipeline.py": ("custom pipeline", "model"),
    "model_index.json": ("pipeline", "model"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", help="a probe, a store of features, a custom pipeline or a pipeline")
    parser.add_argument("repo_id", help="user/name")
    parser.add_argument("--repo_type", choices=("auto", "model", "dataset"), default="auto")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is new")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", help="first line of the commit")
    parser.add_argument("--base", help="of a probe: Hub id to write as its base model, where that was a folder")
    parser.add_argument("--base_revision", help="branch, tag or commit of --base")


def run(args: argparse.Namespace) -> int:
    """Push and print the commit's address."""
    from diffusers_repr.hub import publish_pipeline, push_folder

    kind, repo_type = what_is(args.folder)
    if args.repo_type not in ("auto", repo_type):
        raise ValueError(f"{args.folder!r} is a {kind}, which goes to a {repo_type} repository, not {args.repo_type}.")
    if args.base is not None and kind != "probe":
        raise ValueError(f"--base is for probes; {args.folder!r} is a {kind}.")
    options = {
        "private": args.private,
        "revision": args.revision,
        "commit_message": args.message or f"Upload {kind} with diffusers-repr",
    }
    if kind == "probe":
        from diffusers_repr.tasks.probe_files import push_saved

        address = push_saved(args.folder, args.repo_id, args.base, args.base_revision, **options)
    elif kind == "custom pipeline":
        address = publish_pipeline(args.folder, args.repo_id, **options)
    else:
        if kind == "store of features":
            from diffusers_repr.features.store import FeatureStore

            FeatureStore.open(args.folder).verify()
        address = push_folder(args.folder, args.repo_id, repo_type=repo_type, **options)
    print(f"Pushed the {kind} to {address}")
    return 0


def what_is(folder: str) -> tuple[str, str]:
    """What a folder holds, and the type of repository it goes to.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If it is a file.
        ValueError: If it is none of `KINDS`.
    """
    path = Path(folder)
    if path.is_file():
        raise NotADirectoryError(f"{folder!r} is a file; give the folder that holds what is to be pushed.")
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {folder!r}.")
    for name, kind in KINDS.items():
        if (path / name).is_file():
            return kind
    told = ", ".join(f"{name} ({kind})" for name, (kind, _) in KINDS.items())
    raise ValueError(f"Cannot tell what {folder!r} is: it has none of {told}.")
