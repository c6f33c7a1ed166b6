"""A small Hub on this machine, spoken to over real HTTP by the real `huggingface_hub` client.

It keeps models and data sets in memory, with every commit, and large files through LFS; Xet is not spoken, so a
client sets `HF_HUB_DISABLE_XET=1` before it imports `huggingface_hub`. The endpoint is read at import too, so clients
run as processes of their own:

    with hub_server() as server:
        done = run_python("from huggingface_hub import whoami; print(whoami()['name'])", hub_env(server, tmp_path))
"""

import hashlib
import json
import os
import re
import secrets
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

from tests.testers.hub_store import HubAnswer, HubStore

_REPO = r"(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_FILE_PREFIX = r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)"
_ROUTES = [  # method, address, name of the method that answers
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/validate-yaml", "validate_yaml"),
    ("POST", r"/api/repos/create", "create_repo"),
    ("GET", rf"/api/{_REPO}(/revision/(?P<revision>[^/]+))?", "repo_info"),
    ("GET", rf"/api/{_REPO}/refs", "refs"),
    ("GET", rf"/api/{_REPO}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?", "tree"),
    ("POST", rf"/api/{_REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    ("POST", rf"/api/{_REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", rf"/api/{_REPO}/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", rf"/api/{_REPO}/branch/(?P<revision>[^/]+)", "create_branch"),
    ("POST", rf"{_FILE_PREFIX}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("POST", rf"{_FILE_PREFIX}\.git/info/lfs/verify", "lfs_verify"),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", "storage_put"),
    ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", "storage_get"),
    ("GET", rf"{_FILE_PREFIX}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class _Handler(BaseHTTPRequestHandler):
    """One request: find its route, answer in JSON or bytes, tell errors as the Hub does."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds; an idle connection is closed

    def log_message(self, *args):
        """The server is silent; `server.requests` keeps what was asked."""

    @property
    def store(self):
        return self.server.store

    @property
    def token(self):
        kind, _, token = self.headers.get("authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    def handle_request(self):
        self.body = self._read_body()
        address = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(address.query).items()}
        self.server.requests.append((self.command, unquote(address.path), self.headers.get("host"), self.token))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            for verb, pattern, name in _ROUTES:
                match = re.fullmatch(pattern, address.path)
                if match and verb == method:
                    parts = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    getattr(self, name)(**parts)
                    return
            raise HubAnswer(404, None, f"No such address here: {self.command} {address.path}")
        except HubAnswer as answer:
            headers = {"X-Error-Message": answer.message.replace("\n", " ")}
            if answer.code:
                headers["X-Error-Code"] = answer.code
            self.reply({"error": answer.message}, answer.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _read_body(self):
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def reply(self, content, status=200, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (headers or {})
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reply_file(self, data, headers):
        """A whole file, or the part asked for by `Range: bytes=first-last`."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        if not asked:
            self.reply(data, headers=headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        if first > last:
            raise HubAnswer(416, None, f"The file has {len(data)} bytes")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.reply(data[first : last + 1], 206, headers)

    def repo(self, kind, repo, *, write=False, files=True):
        if write:
            self.store.check_write(self.token, repo.split("/")[0])
        return self.store.repo(
            "dataset" if (kind or "").startswith("dataset") else "model", repo, self.token, files=files
        )

    def address(self, repo):
        return f"{self.server.url}/{'datasets/' if repo.repo_type == 'dataset' else ''}{repo.repo_id}"

    def whoami(self):
        if self.store.role(self.token) is None:
            raise HubAnswer(401, None, "Invalid username or password.")
        self.reply({"type": "user", "name": self.store.user, "fullname": self.store.user, "orgs": []})

    def validate_yaml(self):
        block = re.match(r"---\n(.*?)\n---", json.loads(self.body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(block[1]) if block else {}
        except yaml.YAMLError as error:
            self.reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
            return
        errors = [] if isinstance(data, dict) else [{"message": "The metadata is no mapping"}]
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def create_repo(self):
        asked = json.loads(self.body)
        namespace = asked.get("organization") or self.store.user
        self.store.check_write(self.token, namespace)
        key = (asked.get("type", "model"), f"{namespace}/{asked['name']}")
        repo, status = self.store.repos.get(key), 409
        if repo is None:
            private = asked.get("visibility") == "private" or asked.get("private", False)  # since 1.0 | before
            repo, status = self.store.create(*key, private=private), 200
        answer = {"url": self.address(repo), "name": repo.repo_id, "id": repo.repo_id}
        self.reply(answer | ({"error": "You already created this repo"} if status == 409 else {}), status)

    def create_branch(self, kind, repo, revision):
        found = self.repo(kind, repo, write=True)
        if revision in found.branches:
            raise HubAnswer(409, None, f"Branch {revision} already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.branches[revision] = found.resolve(start)
        self.reply({})

    def repo_info(self, kind, repo, revision):
        self.reply(self.repo(kind, repo, files=False).info(revision or "main"))

    def refs(self, kind, repo):
        branches = self.repo(kind, repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.reply({"branches": listed, "tags": [], "converts": []})

    def tree(self, kind, repo, revision, path):
        recursive = self.query.get("recursive", "").lower() == "true"
        self.reply(self.repo(kind, repo).tree(revision, path or "", recursive))

    def paths_info(self, kind, repo, revision):
        if "json" in self.headers.get("content-type", ""):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        self.reply(self.repo(kind, repo).paths_info(revision, paths))

    def preupload(self, kind, repo, revision):
        found = self.repo(kind, repo, write=True)
        self.reply(self.store.upload_modes(found, revision, json.loads(self.body)["files"]))

    def commit(self, kind, repo, revision):
        found = self.repo(kind, repo, write=True)
        sha = self.store.commit(found, revision, [json.loads(line) for line in self.body.splitlines() if line])
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.address(found)}/commit/{sha}"})

    def lfs_batch(self, kind, repo):
        found = self.repo(kind, repo, write=True)
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in self.store.large_files:
                verify = {"href": f"{self.address(found)}.git/info/lfs/verify"}
                item["actions"] = {"upload": {"href": f"{self.server.storage_url}/{item['oid']}"}, "verify": verify}
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_verify(self, kind, repo):
        self.repo(kind, repo, write=True)
        asked = json.loads(self.body)
        if len(self.store.large_files.get(asked["oid"], b"")) != asked["size"]:
            raise HubAnswer(404, None, "The object was not uploaded")
        self.reply({})

    def storage_put(self, oid):
        if self.server.broken_storage:
            raise HubAnswer(507, None, "Insufficient storage")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubAnswer(400, None, "The content does not have this SHA-256")
        self.store.large_files[oid] = self.body
        self.reply({})

    def storage_get(self, oid):
        if oid not in self.store.large_files:
            raise HubAnswer(404, None, "No such object")
        self.reply_file(self.store.large_files[oid], {"ETag": f'"{oid}"'})

    def resolve(self, kind, repo, revision, path):
        found = self.repo(kind, repo)
        try:
            sha, file = found.file(revision, path)
        except HubAnswer as answer:
            if answer.code != "EntryNotFound":
                raise
            headers = {"X-Error-Code": answer.code, "X-Repo-Commit": found.resolve(revision)}
            self.reply({"error": answer.message}, answer.status, headers)
            return
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.content_id}"'}
        if file.sha256 is None:
            self.reply_file(file.data, headers)
            return
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        name = quote(path.rsplit("/", 1)[-1])
        location = f"{self.server.storage_url}/{file.sha256}?filename={name}"
        self.reply(b"", 302, headers | {"Location": location})


class HubServer(ThreadingHTTPServer):
    """The running server.

    `url` is the endpoint; large files lie under another host name, as on the Hub, where no token must be sent.
    `token` writes for `user`, `read_token` only reads. `requests` lists (method, path, host, token) of all requests.
    Large files are refused while `broken_storage` is true.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.user = "user"
        self.token, self.read_token = (f"hf_{secrets.token_hex(16)}" for _ in range(2))
        self.store = HubStore(self.user, {self.token: "write", self.read_token: "read"})
        self.requests = []
        self.broken_storage = False
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.storage_url = f"http://localhost:{self.server_port}/storage"


@contextmanager
def hub_server():
    """Run a Hub in a thread of this process for the length of the block."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hub_env(server, tmp_path, *, token=True, **changes):
    """Environment of a client process.

    Args:
        server: A `HubServer`, or an address (str) for one that need not exist.
        tmp_path: Folder for caches; clients with the same one share them.
        token: True for the server's token that writes, a string for another one, None for none.
        **changes: Further variables; None removes one.
    """
    url = server if isinstance(server, str) else server.url
    if token is True:
        token = None if isinstance(server, str) else server.token
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env = kept | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_MODULES_CACHE": str(tmp_path / "hf_modules"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    cleared = (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_TOKEN_PATH",
        "HF_HUB_CACHE",
        "HF_DATASETS_CACHE",
        "HF_HUB_OFFLINE",
    )
    for key in (*cleared, "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE", "HF_DEBUG"):
        env.pop(key, None)
    changes = ({"HF_TOKEN": token} if token else {}) | changes
    for key, value in changes.items():
        env.pop(key, None)
        if value is not None:
            env[key] = str(value)
    return env


def run_python(code, env, *, timeout=120):
    """Run `code` by this Python in a process of its own; stdout and stderr come back as text."""
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
