"""What the Hub client raises, told again as: what came, what is allowed, what to try."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors, get_token
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, validate_repo_id

# Clients before 1.0 do not tell a snapshot that is partly in the cache from one that is not there.
_INCOMPLETE = getattr(errors, "IncompleteSnapshotError", ())
# Whatever the client's HTTP library raises: httpx, or requests before 1.0.
_HTTP_LIBRARY = HTTPError.__module__.partition(".")[0]
_HTTP_ERROR = next(kind for kind in reversed(HTTPError.__mro__) if kind.__module__.startswith(_HTTP_LIBRARY))
_LOG_IN = "log in with `hf auth login`, set HF_TOKEN, or pass `token=`"
_TOKEN = re.compile(r"\bhf_\w{8,}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(OSError):
    """The Hub, or the way to it, did not give what was asked for. The message says what to try; no token is in it."""


def is_repo_id(value: object) -> bool:
    """Whether `value` has the form of a Hub id (`"name"` or `"user/name"`); nothing is looked up.

    Example:
        >>> is_repo_id("user/name"), is_repo_id("./folder"), is_repo_id("/a/b/c")
        (True, False, False)
    """
    if not isinstance(value, str):
        return False
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True


def is_commit_sha(revision: str | None) -> bool:
    """Whether `revision` is a full commit id (40 hexadecimal digits), which never moves.

    Example:
        >>> is_commit_sha("main"), is_commit_sha("0123456789abcdef0123456789abcdef01234567")
        (False, True)
    """
    return revision is not None and _COMMIT.fullmatch(revision) is not None


@contextmanager
def hub_errors(
    action: str, repo_id: str, *, repo_type: str = "model", revision: str | None = None, note: str = ""
) -> Iterator[None]:
    """Turn what the Hub client raises inside the block into a `HubError`.

    Args:
        action: What is being done, as it stands in the message: `"load"`, `"push to"`.
        repo_id: The id that was asked for.
        repo_type: `"model"`, `"dataset"` or `"space"`.
        revision: The revision that was asked for; None is the main branch.
        note: What to add to the name, in brackets.

    Raises:
        HubError: For every answer of the Hub that is an error, and for no answer.
    """
    what = f"Cannot {action} {repo_type} repository {repo_id!r}" + (f" ({note})" if note else "")
    try:
        yield
    except RuntimeError as error:  # the client wraps a failed upload of one large file
        if not isinstance(error.__cause__, (_HTTP_ERROR, OSError)):
            raise
        raise HubError(f"{what}: {_explain(error.__cause__, repo_id, revision)}") from error
    except (EntryNotFoundError, _HTTP_ERROR, FileMetadataError, OfflineModeIsEnabled) as error:
        raise HubError(f"{what}: {_explain(error, repo_id, revision)}") from error


def _explain(error: BaseException, repo_id: str, revision: str | None) -> str:
    """One or two sentences for one exception of the client, most special class first."""
    here = f"at {constants.ENDPOINT}"
    if isinstance(error, LocalEntryNotFoundError):
        if isinstance(error.__cause__, HfHubHTTPError):
            return f"{_explain_status(error.__cause__, repo_id, here)} It is not in the cache either."
        return _explain_not_cached(error, revision)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked. Unset it, or pass a local folder."
    if isinstance(error, GatedRepoError):
        return (
            f"the repository is gated and this account has no access. Ask for it on {constants.ENDPOINT}/{repo_id}, "
            f"then {_LOG_IN}."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"it has no revision {revision!r}. Allowed are a branch, a tag or a full commit id; "
            "`huggingface_hub.list_repo_refs` lists them."
        )
    if isinstance(error, EntryNotFoundError):
        return (
            f"the file is not in it at revision {revision or 'main'!r}. "
            "`huggingface_hub.list_repo_files` lists what is there."
        )
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error, repo_id, here)
    if isinstance(error, FileMetadataError):
        return f"what answers {here} is no Hub. Check HF_ENDPOINT, proxy and firewall."
    return (
        f"no connection to the Hub {here} ({type(error).__name__}). Check the connection, HF_ENDPOINT and proxy "
        "settings, or work from a local folder."
    )


def _explain_not_cached(error: LocalEntryNotFoundError, revision: str | None) -> str:
    """The Hub was not reached and the cache does not hold (all of) what was asked for."""
    cached = "is only partly in the cache" if isinstance(error, _INCOMPLETE) else "is not in the cache"
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set and revision {revision or 'main'!r} {cached}. Unset HF_HUB_OFFLINE to download "
            "it, or pass a local folder."
        )
    return (
        f"no connection to the Hub at {constants.ENDPOINT}, and revision {revision or 'main'!r} {cached}. Check the "
        "connection, HF_ENDPOINT and proxy settings, or pass a local folder; with HF_HUB_OFFLINE=1 the cache is used "
        "without asking the Hub."
    )


def _explain_status(error: HfHubHTTPError, repo_id: str, here: str) -> str:
    """The Hub answered with an HTTP error."""
    status = error.response.status_code
    has_token = get_token() is not None or "authorization" in error.response.request.headers
    if status == 401 and has_token and not isinstance(error, RepositoryNotFoundError):
        return f"the Hub {here} did not accept the token (401). It may be wrong or expired: {_LOG_IN}."
    if status == 401 and not has_token:
        return f"it does not exist {here}, or it is private and no token was sent (401): check the id, or {_LOG_IN}."
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return (
            f"there is no such repository {here}, or it is private and the token has no access to it. Check the id "
            f"{repo_id!r} and the repository type."
        )
    said = _TOKEN.sub("hf_***", error.server_message or "")
    said = f" The Hub said: {said}" if said else ""
    if status == 403:
        return (
            "the token does not have the right to do this (403). Writing needs a token of kind 'write' (or a "
            f"fine-grained one that names the repository) and a namespace that is yours.{said}"
        )
    if isinstance(error, BadRequestError):
        return f"the Hub refused the request (400).{said}"
    return f"the Hub {here} answered with error {status}.{said} Try again later."
