"""Many repositories to one namespace: what has changed is pushed, and one failure does not stop the rest."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, RepoCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from yaml import YAMLError

from diffusers_repr.hub.errors import HubError, hub_errors, is_repo_id
from diffusers_repr.hub.push import check_pipeline_file, push_folder
from diffusers_repr.hub.scheduler_file import stage_scheduler
from diffusers_repr.hub.upload import Upload

PublicationKind = Literal["pipelines", "schedulers", "models", "heads"]
PUBLICATION_KINDS: tuple[PublicationKind, ...] = ("pipelines", "schedulers", "models", "heads")
_MESSAGES = {
    "pipelines": "Upload pipeline with diffusers-repr",
    "schedulers": "Upload scheduler with diffusers-repr",
    "models": "Upload model with diffusers-repr",
    "heads": "Upload head with diffusers-repr",
}
_LISTS = {"pipelines": "custom pipeline", "schedulers": "scheduler", "heads": "head"}  # of a model its files tell


@dataclass(frozen=True)
class Publication:
    """One repository to be.

    Attributes:
        kind: One of `PUBLICATION_KINDS`.
        name: Of the repository, without its namespace.
        source: A folder with a README.md, of a pipeline also with `pipeline.py`; of a scheduler its file.
        push: What uploads a folder, with the arguments of `push_folder` (no `kind`); None is `push_folder`.
    """

    kind: PublicationKind
    name: str
    source: Path
    push: Callable[..., str] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a publication.

    Attributes:
        publication: Which.
        repo_id: Where it went, or would.
        state: `pushed` (a new commit), `unchanged` (no commit), `planned` (a dry run) or `failed`.
        detail: Address of the commit; of a failure why.
        upload: The files that were, or would be, sent; None where it did not come so far.
    """

    publication: Publication
    repo_id: str
    state: Literal["pushed", "unchanged", "planned", "failed"]
    detail: str
    upload: Upload | None = None


def publish(
    publications: Sequence[Publication],
    namespace: str,
    *,
    private: bool = False,
    token: str | None = None,
    dry_run: bool = False,
    report: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Push each to `namespace/name`.

    A repository whose files are those it has already gets no commit. What fails is told in its outcome, and the rest
    goes on.

    Args:
        publications: What to push, in this order.
        namespace: User or organisation.
        private: Whether repositories made here are private; those that exist keep what they are.
        token: As in `push_folder`.
        dry_run: Check all, list the files, send nothing.
        report: Called with each outcome as soon as it is known.

    Returns:
        An outcome for each.

    Raises:
        ValueError: For a namespace that is none, or two publications of one name.
        HubError: If there is no token.
    """
    _check_namespace(namespace)
    names = [publication.name for publication in publications]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        where = [str(item.source) for item in publications if item.name == twice[0]]
        raise ValueError(f"Two would go to {namespace}/{twice[0]}: {', '.join(where)}. Rename one of them.")
    if not dry_run and token is None and get_token() is None:
        raise HubError(
            f"Cannot publish to {namespace!r}: no Hub token was found. Log in with `hf auth login`, or set HF_TOKEN; "
            "--dry_run needs none."
        )
    outcomes = []
    for publication in publications:
        repo_id = f"{namespace}/{publication.name}"
        uploads: list[Upload] = []
        try:
            state, detail = _publish_one(publication, repo_id, private, token, dry_run, uploads.append)
            outcome = Outcome(publication, repo_id, state, detail, uploads[0] if uploads else None)
        except Exception as error:  # whatever it is, the others are not to blame
            outcome = Outcome(publication, repo_id, "failed", " ".join(str(error).split()) or type(error).__name__)
        outcomes.append(outcome)
        if report is not None:
            report(outcome)
    return outcomes


def _publish_one(
    item: Publication,
    repo_id: str,
    private: bool,
    token: str | None,
    dry_run: bool,
    report: Callable[[Upload], None],
) -> tuple[Literal["pushed", "unchanged", "planned"], str]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = item.source
        if item.kind == "schedulers":
            folder = stage_scheduler(item.source, temporary, repo_id)
        elif item.kind == "pipelines":
            check_pipeline_file(folder / "pipeline.py")
        _check_card(folder)
        push = item.push or functools.partial(push_folder, kind=_LISTS.get(item.kind))
        if dry_run:
            push(folder, repo_id, dry_run=True, report=report)
            return "planned", str(item.source)
        before = _head(repo_id, token)
        message = _MESSAGES[item.kind]
        address = push(folder, repo_id, private=private, token=token, commit_message=message, report=report)
    return ("unchanged" if before is not None and address.endswith(before) else "pushed"), address


def _head(repo_id: str, token: str | None) -> str | None:
    """Last commit of the main branch; None if there is no such repository."""
    with hub_errors("read", repo_id):
        try:
            return HfApi(token=token, library_name="diffusers-repr").repo_info(repo_id).sha
        except RepositoryNotFoundError:
            return None


def _check_card(folder: Path) -> None:
    card = folder / "README.md"
    if not card.is_file():
        raise ValueError(f"{str(folder)!r} has no README.md, the card that the Hub shows. Write one first.")
    try:
        data = RepoCard(card.read_text("utf-8")).data.to_dict()
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The metadata of the card {str(card)!r} cannot be read: {error}") from error
    if not data:
        raise ValueError(f"The card {str(card)!r} has no metadata between two lines '---'. Name license and tags.")


def _check_namespace(namespace: str) -> None:
    if "/" in namespace or not is_repo_id(f"{namespace}/name"):
        raise ValueError(
            f"{namespace!r} is no namespace to publish to. It is the name of a user or organisation: letters, "
            "digits, '-', '_' and '.'."
        )
