"""What a Hub keeps: repositories, their commits and branches, and large files; held in memory."""

import base64
import hashlib
import itertools
import json
import threading
from dataclasses import dataclass, field

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".arrow", ".npz", ".npy", ".pt")
LFS_SIZE = 10 * 1024 * 1024  # bytes; larger files are large files whatever their name
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class HubAnswer(Exception):
    """An answer of the Hub that is an error: HTTP status, X-Error-Code, message."""

    def __init__(self, status, code=None, message=""):
        super().__init__(f"{status} {code} {message}")
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class StoredFile:
    """One file of one commit: its bytes, or for a large file its SHA-256 and size."""

    data: bytes | None = None
    sha256: str | None = None
    size: int = 0

    @property
    def blob_id(self):
        """Git's own id of what git keeps: the file, or the pointer to the large file."""
        data = self.data if self.sha256 is None else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def pointer(self):
        """What git keeps of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def content_id(self):
        """What the client compares with its local file to see whether it has changed."""
        return self.sha256 or self.blob_id

    def info(self, path):
        """The file as an entry of a tree."""
        entry = {"type": "file", "path": path, "oid": self.blob_id, "size": self.size}
        if self.sha256 is not None:
            lfs = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
            entry["lfs"] = lfs
        return entry


@dataclass
class Repo:
    """One repository; every commit is kept, so that `revision=<sha>` works."""

    repo_id: str
    repo_type: str
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # sha -> {path: StoredFile}, in the order they were made
    titles: dict = field(default_factory=dict)  # sha -> first line of its message
    branches: dict = field(default_factory=dict)  # name -> sha

    def resolve(self, revision):
        """Commit id of a branch or a commit id."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubAnswer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def file(self, revision, path):
        """(commit id, file)."""
        sha = self.resolve(revision)
        if path not in self.commits[sha]:
            raise HubAnswer(404, "EntryNotFound", "Entry not found")
        return sha, self.commits[sha][path]

    def info(self, revision="main"):
        """What `model_info` and `dataset_info` read."""
        sha = self.resolve(revision)
        return {
            "_id": hashlib.sha1(self.repo_id.encode()).hexdigest()[:24],
            "id": self.repo_id,
            "author": self.repo_id.split("/")[0],
            "sha": sha,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "lastModified": "2024-01-01T00:00:00.000Z",
            "createdAt": "2024-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": path} for path in sorted(self.commits[sha])],
        }

    def tree(self, revision, folder, recursive):
        """Entries below `folder` ("" is the top), folders before what they hold."""
        files = self.commits[self.resolve(revision)]
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path in sorted(path for path in files if path.startswith(prefix)):
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(name.encode()).hexdigest()
                if recursive or depth == 1:
                    entries.setdefault(name, {"type": "directory", "path": name, "oid": oid, "size": 0})
            if recursive or len(parts) == 1:
                entries[path] = files[path].info(path)
        if folder and not entries:
            raise HubAnswer(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
        return list(entries.values())

    def paths_info(self, revision, paths):
        """Entries of those paths that exist."""
        files = self.commits[self.resolve(revision)]
        entries = [files[path].info(path) for path in paths if path in files]
        folders = [path for path in paths if any(name.startswith(f"{path}/") for name in files)]
        return entries + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]


class HubStore:
    """All repositories, all large files, and the accounts that may write."""

    def __init__(self, user, tokens):
        self.user = user
        self.tokens = tokens  # token -> "write" or "read"
        self.repos = {}  # (type, id) -> Repo
        self.large_files = {}  # sha256 -> bytes
        self.lock = threading.RLock()
        self.counter = itertools.count()

    def role(self, token):
        """ "write", "read", or None without a token."""
        if token is None:
            return None
        if token not in self.tokens:
            raise HubAnswer(401, None, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def check_write(self, token, namespace):
        """Refuse who may not write there."""
        role = self.role(token)
        if role is None:
            raise HubAnswer(401, None, "Invalid username or password.")
        if role != "write" or namespace != self.user:
            raise HubAnswer(403, None, f"You don't have the rights to write under the namespace {namespace!r}")

    def repo(self, repo_type, repo_id, token, *, files=True):
        """The repository, if the token may read it; `files=False` asks only for what a gate leaves open."""
        role, repo = self.role(token), self.repos.get((repo_type, repo_id))
        if repo is None or (repo.private and role is None):
            raise HubAnswer(401 if role is None else 404, "RepoNotFound", "Repository not found")
        if repo.gated and files and not repo_id.startswith(f"{self.user}/" if role else "\0"):
            raise HubAnswer(401 if role is None else 403, "GatedRepo", f"Access to {repo_id} is restricted.")
        return repo

    def create(self, repo_type, repo_id, private=False, gated=False):
        """A repository with its first commit, as the Hub makes it."""
        with self.lock:
            repo = self.repos[repo_type, repo_id] = Repo(repo_id, repo_type, private, gated)
            files = {".gitattributes": StoredFile(GIT_ATTRIBUTES, size=len(GIT_ATTRIBUTES))}
            self.add_commit(repo, "main", files, "initial commit")
        return repo

    def add_commit(self, repo, branch, files, title):
        """Put `files` at the head of `branch`."""
        state = [next(self.counter), repo.repo_id, branch, [(p, f.blob_id) for p, f in sorted(files.items())]]
        sha = hashlib.sha1(json.dumps(state).encode()).hexdigest()
        repo.commits[sha], repo.titles[sha], repo.branches[branch] = files, title, sha
        return sha

    def add_file(self, repo, path, data, branch="main"):
        """Put one small file there without a client, for a test to start from."""
        files = repo.commits[repo.branches[branch]] | {path: StoredFile(data, size=len(data))}
        return self.add_commit(repo, branch, files, f"Add {path}")

    def upload_modes(self, repo, revision, files):
        """Answer to `preupload`: which files go as large files, and what is already there."""
        stored = repo.commits[repo.resolve(revision)]
        answer = []
        for file in files:
            path = file["path"]
            large = path.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            entry = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if path in stored:
                entry["oid"] = stored[path].content_id
            answer.append(entry)
        return {"files": answer}

    def commit(self, repo, branch, lines):
        """Apply the lines of a commit (one JSON object each) and return its id."""
        with self.lock:
            if branch not in repo.branches:
                raise HubAnswer(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            files, title = dict(repo.commits[repo.branches[branch]]), ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, repo.branches[branch]):
                        raise HubAnswer(412, None, "A commit has happened since. Please refresh and try again.")
                elif key == "file":
                    data = base64.b64decode(value["content"])
                    files[value["path"]] = StoredFile(data, size=len(data))
                elif key == "lfsFile":
                    if value["oid"] not in self.large_files:
                        raise HubAnswer(400, None, f"LFS object {value['oid']} was not uploaded")
                    size = len(self.large_files[value["oid"]])
                    files[value["path"]] = StoredFile(sha256=value["oid"], size=size)
                elif key == "deletedFile":
                    if files.pop(value["path"], None) is None:
                        raise HubAnswer(404, "EntryNotFound", "A file with this name doesn't exist")
                elif key == "deletedFolder":
                    prefix = value["path"].rstrip("/") + "/"
                    files = {path: file for path, file in files.items() if not path.startswith(prefix)}
                else:
                    raise HubAnswer(400, None, f"Unknown operation {key!r}")
            return self.add_commit(repo, branch, files, title)
