"""`diffusers-repr publish --namespace NAME`: push the pipelines, schedulers and models of this project to the Hub."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import logging

from diffusers_repr.config.recipe import REQUIRED, setting
from diffusers_repr.hub.publish import PUBLICATION_KINDS, Outcome, Publication, publish


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Arguments of the command."""

    namespace: str = setting(REQUIRED, "user or organisation: repositories are NAMESPACE/<folder>")
    only: list[str] = setting(list(PUBLICATION_KINDS), f"these kinds alone, of {', '.join(PUBLICATION_KINDS)}")
    folder: list[str] = setting(
        [], "more trained pipelines, models, heads or probes: a folder each, or a folder that holds such folders"
    )
    dry_run: bool = setting(False, "check all, list the files that would go where, send nothing")
    private: bool = setting(False, "make repositories private that are new")

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(PUBLICATION_KINDS))
        if unknown:
            raise ValueError(f"--only takes {', '.join(PUBLICATION_KINDS)}; got {', '.join(unknown)}.")


def run(args: Settings) -> int:
    """Publish; 1 if anything failed, which is told at the end."""
    publications = find_publications(args.only, args.folder)
    with _quiet_client():
        outcomes = publish(
            publications,
            args.namespace,
            private=args.private,
            dry_run=args.dry_run,
            report=lambda one: print("\n".join(_lines(one, args.dry_run)), flush=True),
        )
    counts = Counter(outcome.state for outcome in outcomes)
    summary = ", ".join(
        f"{counts[state]} {state}" for state in ("pushed", "unchanged", "planned", "failed") if counts[state]
    )
    print(f"{len(outcomes)} repositories: {summary}" + ("; nothing was sent" if args.dry_run else ""))
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    for outcome in failed:
        print(f"diffusers-repr publish: {outcome.repo_id} failed: {outcome.detail}", file=sys.stderr)
    return 1 if failed else 0


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Without a warning of the Hub client for each repository that has not changed; our line says so."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def find_publications(kinds: Sequence[str], folders: list[str]) -> list[Publication]:
    """What there is to publish, in the order of `PUBLICATION_KINDS`, each kind by name.

    Pipelines and schedulers are those of the package, in a clone and in an installation; trained models and heads are
    those of `examples/models` of a clone, and of `folders`.

    Args:
        kinds: Kinds that are wanted.
        folders: Folders of models, heads or probes, or folders that hold such.

    Raises:
        FileNotFoundError: If a folder does not exist, or neither `examples/models` nor folders are there for kinds
            that need them.
        ValueError: If a folder holds nothing that can be published.
    """
    from diffusers_repr.hub.own_pipelines import pipeline_files, scheduler_files

    found = [Publication("pipelines", file.parent.name, file.parent) for file in pipeline_files()]
    found += [Publication("schedulers", file.stem, file) for file in scheduler_files()]
    trained = [kind for kind in ("models", "heads") if kind in kinds]
    if trained:
        examples = _examples()
        if examples is None and not folders:
            hint = "examples/models is part of a clone of the repository, not of an installed package"
            if len(trained) == len(kinds):
                raise FileNotFoundError(f"No models or heads: {hint}. Give --folder, or run in a clone.")
            print(f"No models and heads: {hint}.")
        for root in [*([] if examples is None else [examples]), *map(Path, folders)]:
            found += _trained(root)
    elif folders:
        raise ValueError(f"--folder is for models and heads; --only {' '.join(kinds)} leaves them out.")
    return sorted(
        (one for one in found if one.kind in kinds), key=lambda one: (PUBLICATION_KINDS.index(one.kind), one.name)
    )


def _examples() -> Path | None:
    """`examples/models` beside the package, which a clone alone has."""
    import diffusers_repr

    folder = Path(diffusers_repr.__file__).resolve().parents[1] / "examples" / "models"
    return folder if folder.is_dir() else None


def _trained(root: Path) -> list[Publication]:
    """The artefact that a folder is, or those it holds."""
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {str(root)!r}.")
    for candidates in ([root], sorted(path for path in root.iterdir() if path.is_dir())):
        found = [one for one in map(_artefact, candidates) if one is not None]
        if found:
            return found
    raise ValueError(
        f"{str(root)!r} is no pipeline (model_index.json), model or head (config.json) or task (probe.json, "
        "segmentation.json, panoptic.json, correspondence.json, zero_shot.json), and holds no such folder."
    )


def _artefact(folder: Path) -> Publication | None:
    from diffusers_repr.hub import read_json

    name = Path(os.path.abspath(folder)).name
    tasks = ("probe.json", "segmentation.json", "panoptic.json", "correspondence.json", "zero_shot.json")
    if any((folder / file).is_file() for file in tasks):
        from diffusers_repr.tasks.files import push_saved

        return Publication("heads", name, folder, push_saved)
    if (folder / "model_index.json").is_file():
        return Publication("models", name, folder)
    if not (folder / "config.json").is_file():
        return None
    config = read_json(folder / "config.json")
    is_head = isinstance(config, dict) and _is_head(str(config.get("_class_name")))
    return Publication("heads" if is_head else "models", name, folder)


def _is_head(class_name: str) -> bool:
    """Whether a class is one of `diffusers_repr.heads`, read and not imported: torch is not needed to publish."""
    import diffusers_repr

    files = sorted((Path(diffusers_repr.__file__).parent / "heads").rglob("*.py"))
    return any(f"\nclass {class_name}(" in file.read_text("utf-8") for file in files)


def _lines(outcome: Outcome, files: bool) -> list[str]:
    """What became of it; of a dry run the files too; and what stays here."""
    detail = "" if outcome.state == "failed" else f"  {outcome.detail}"
    lines = [f"{outcome.publication.kind:10}  {outcome.state:9}  {outcome.repo_id}{detail}"]
    if outcome.upload is not None:
        more = outcome.upload.listing() if files else []
        more += [line for line in [outcome.upload.left_out_line()] if line is not None]
        lines += [f"    {line}" for line in more]
    return lines
