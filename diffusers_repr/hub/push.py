"""From a folder to the Hub: every check that needs no network comes before the first request."""

from __future__ import annotations

import ast
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token

from diffusers_repr.hub.errors import HubError, hub_errors, is_commit_sha, is_repo_id
from diffusers_repr.hub.upload import Upload, plan_upload

_REPO_TYPES = ("model", "dataset")
_OTHER_PIPELINES = ("diffusers", "transformers")  # their pipelines do not count as custom ones


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    kind: str | None = None,
    include: Sequence[str] = (),
    repo_type: str = "model",
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with diffusers-repr",
    create: bool = True,
    dry_run: bool = False,
    report: Callable[[Upload], None] | None = None,
) -> str:
    """Upload the files of an artefact to a Hub repository; what the repository holds besides them stays.

    Only files on the list of the artefact's kind (`diffusers_repr.hub.allowed.KINDS`) and pictures that its README.md
    shows are sent; links are not followed out of the folder; places of this machine in configs and card become their
    last names.

    Args:
        folder: The folder; its layout becomes that of the repository.
        repo_id: `"user/name"`.
        kind: What it holds, one of `diffusers_repr.hub.allowed.KINDS`; None: what its files tell.
        include: Further files to send, as paths in the folder (`*` for a part of a name); never pickles, hidden files
            or links. A folder of no known kind sends these and README.md.
        repo_type: `"model"` or `"dataset"`.
        private: Whether a repository made here is private; one that exists keeps what it is.
        token: Hub token with the right to write; None takes the one of `hf auth login` or HF_TOKEN. It is neither
            printed nor stored.
        revision: Branch to push to; None is the main branch. With `create` a missing branch is made.
        commit_message: First line of the commit.
        create: Make the repository if it does not exist; False: it must exist.
        dry_run: Check everything that needs no network, report, send nothing and return "".
        report: Called with what would be sent before it is; without it, a warning tells of files that are left out.

    Returns:
        Address of the commit. If nothing has changed, that of the last commit.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If it is a file.
        ValueError: If it has no file to push, a file on the list may not be sent (`plan_upload`), the id, type or
            branch is not allowed, or README.md has metadata that the Hub refuses.
        HubError: If there is no token, the token is not accepted or may not write there, or the Hub is not reached.
    """
    path = _check_folder(folder)
    _check_target(repo_id, repo_type, revision)
    upload = plan_upload(path, kind, include)
    if report is not None:
        report(upload)
    elif upload.left_out:
        warnings.warn(f"Not all of {str(folder)!r} is pushed; {upload.left_out_line()}.", stacklevel=2)
    if dry_run:
        return ""
    if token is None and get_token() is None:
        raise HubError(
            f"Cannot push to {repo_id!r}: no Hub token was found. Log in with `hf auth login`, set HF_TOKEN, or pass "
            "`token=`."
        )
    api = HfApi(token=token, library_name="diffusers-repr")
    with (
        tempfile.TemporaryDirectory() as stage,
        hub_errors("push to", repo_id, repo_type=repo_type, revision=revision),
    ):
        upload.stage(Path(stage))
        if create:
            api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, repo_type=repo_type, folder_path=stage, revision=revision, commit_message=commit_message
        )
    return str(commit.commit_url)


def publish_pipeline(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload pipeline with diffusers-repr",
    dry_run: bool = False,
    report: Callable[[Upload], None] | None = None,
) -> str:
    """Upload a custom pipeline, to be loaded with `custom_pipeline="user/name", trust_remote_code=True`.

    Args:
        folder: A folder with `pipeline.py`, which must pass `check_pipeline_file`.
        repo_id: `"user/name"`.
        private: Whether a repository made here is private.
        token: As in `push_folder`.
        revision: Branch to push to; None is the main branch.
        commit_message: First line of the commit.
        dry_run: As in `push_folder`.
        report: As in `push_folder`.

    Returns:
        Address of the commit.

    Raises:
        FileNotFoundError: If the folder or its `pipeline.py` does not exist.
        ValueError: If diffusers could not load `pipeline.py` from the Hub, or as in `push_folder`.
        HubError: As in `push_folder`.
    """
    path = _check_folder(folder)
    check_pipeline_file(path / "pipeline.py")
    return push_folder(
        path,
        repo_id,
        kind="custom pipeline",
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        dry_run=dry_run,
        report=report,
    )


def check_pipeline_file(path: str | os.PathLike[str]) -> str:
    r"""Check, without running it, that diffusers can load a custom pipeline file from the Hub.

    diffusers takes the one class in the file's namespace that descends from `DiffusionPipeline` and is not its own;
    an imported one counts. A class counts as a pipeline here if a base of it is one of this file or has a name that
    ends in "Pipeline".

    Args:
        path: The file.

    Returns:
        Name of its pipeline class.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not Python, imports relatively, or has no pipeline class or several.

    Example:
        >>> file = getfixture("tmp_path") / "pipeline.py"
        >>> _ = file.write_text("from diffusers import DiffusionPipeline\nclass My(DiffusionPipeline): ...")
        >>> check_pipeline_file(file)
        'My'
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path.name!r} in {str(path.parent)!r}; a custom pipeline needs it.")
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 0
        raise ValueError(f"{str(path)!r} is not valid Python (line {line}): {error}. Correct it first.") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            raise ValueError(
                f"{str(path)!r}, line {node.lineno}, imports relatively (from {'.' * node.level}{node.module or ''}). "
                "diffusers fetches one file of a custom pipeline by name: import from an installed package, by its "
                "full name."
            )
    found = _pipeline_names(tree)
    if not found:
        raise ValueError(
            f"{str(path)!r} has no class that descends from DiffusionPipeline; diffusers loads exactly one. Define "
            "it at the top level of the file."
        )
    if len(found) > 1:
        listed = ", ".join(f"{name} (line {line})" for name, line in found.items())
        raise ValueError(
            f"{str(path)!r} has several pipeline classes in its namespace: {listed}. diffusers loads exactly one: "
            "keep one; of a module that holds another, import the module (`import package.module`)."
        )
    return next(iter(found))


def _pipeline_names(tree: ast.Module) -> dict[str, int]:
    """Top-level names that diffusers would take for a custom pipeline -> line."""
    found: dict[str, int] = {}
    for node in _top_level(tree.body):
        if isinstance(node, ast.ClassDef):
            bases = [_name_of(base) for base in node.bases]
            if any(base in found or base.endswith("Pipeline") for base in bases):
                found[node.name] = node.lineno
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in _OTHER_PIPELINES:
            found.update({a.asname or a.name: node.lineno for a in node.names if a.name.endswith("Pipeline")})
        elif isinstance(node, ast.Assign) and _name_of(node.value) in found:
            found.update({target.id: node.lineno for target in node.targets if isinstance(target, ast.Name)})
    return found


def _top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run in the module's own namespace, also those inside `if`, `try` and `with`."""
    statements: list[ast.stmt] = []
    for node in body:
        statements.append(node)
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            blocks = [getattr(node, field, []) for field in ("body", "orelse", "finalbody")]
            blocks += [handler.body for handler in getattr(node, "handlers", [])]
            for block in blocks:
                statements += _top_level(block)
    return statements


def _name_of(node: ast.expr) -> str:
    """`C` of `a.b.C` and of `C`; "" of anything else."""
    if isinstance(node, ast.Subscript):
        return _name_of(node.value)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def _check_folder(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    if path.is_file():
        raise NotADirectoryError(f"{str(folder)!r} is a file; give the folder that holds what is to be pushed.")
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Save what is to be pushed first.")
    return path


def _check_target(repo_id: str, repo_type: str, revision: str | None) -> None:
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ValueError(
            f"{repo_id!r} is no repository id to push to. It is 'user/name' (or 'organisation/name') of letters, "
            "digits, '-', '_' and '.'."
        )
    if repo_type not in _REPO_TYPES:
        raise ValueError(f"repo_type={repo_type!r}; allowed are {', '.join(map(repr, _REPO_TYPES))}.")
    if is_commit_sha(revision):
        raise ValueError(f"revision={revision!r} is a commit, which cannot change. Give a branch, or leave it out.")
