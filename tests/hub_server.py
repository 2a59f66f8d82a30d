"""A small Hub on the loopback interface, strict where the real one is: for driving the real client.

It keeps repositories in memory, checks tokens, paths, parent commits and the hash of every uploaded object, and can
be told to fail.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITE_TOKEN = "hf_" + "w" * 34
READ_TOKEN = "hf_" + "r" * 34
DATE = "2025-01-01T00:00:00.000Z"
_PAGE = 3
_LFS_BYTES = 1000


@dataclass
class Blob:
    """A file at a commit: its content, and whether it is stored as a large object."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id, **lfs}


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str | None, tree: dict[str, Blob]) -> str:
        listing = json.dumps([len(self.commits), {path: blob.oid for path, blob in tree.items()}])
        sha = hashlib.sha1(listing.encode()).hexdigest()
        self.commits[sha] = tree
        if branch is not None:
            self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        return self.branches.get(revision) or self.tags.get(revision) or self.pull_requests.get(revision)


@dataclass
class Fault:
    """For requests whose line matches ``pattern``: call ``hook`` before their body is read, answer with ``status``."""

    pattern: str
    status: int = 0
    message: str = ""
    times: int = 1_000_000
    hook: Callable[[], None] | None = None


class RefusalError(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer:
    """The repositories, the faults to inject and the log of requests (``"PUT /path"``)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.lock = threading.RLock()
        self.url = ""

    def add_repo(self, repo_id: str, files: dict[str, bytes], **settings: bool) -> Repo:
        repo = self.repos[repo_id] = Repo(**settings)
        repo.commit("main", {path: Blob(data, len(data) >= _LFS_BYTES) for path, data in files.items()})
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader sees."""
        repo = self.repos[repo_id]
        return {path: blob.content for path, blob in repo.commits[repo.resolve(revision) or ""].items()}

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.log)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        hub = self

        class Bound(Handler):
            server_state = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    server_state: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        hub = self.server_state
        parsed = urllib.parse.urlsplit(self.path)
        line = f"{self.command} {urllib.parse.unquote(self.path)}"
        self.query = dict(urllib.parse.parse_qsl(parsed.query))
        try:
            hub.log.append(line)
            faults = [fault for fault in hub.faults if fault.times > 0 and re.search(fault.pattern, line)]
            for fault in faults:
                fault.times -= 1
                if fault.hook is not None:
                    fault.hook()
            self.body = self._read_body()
            for fault in faults:
                if fault.status:
                    raise RefusalError(fault.status, fault.message)
            with hub.lock:
                for method, pattern, handler in ROUTES:
                    match = re.fullmatch(pattern, parsed.path)
                    if match and self.command in method.split():
                        handler(self, *(urllib.parse.unquote(group or "") for group in match.groups()))
                        return
            raise RefusalError(404, f"no such route: {line}")
        except RefusalError as refusal:
            headers = {"X-Error-Message": refusal.message} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._json({"error": refusal.message}, refusal.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            content = self.rfile.read(length)
            if len(content) < length:
                raise ConnectionResetError("the client died while sending")
            return content
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _role(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        roles = {f"Bearer {WRITE_TOKEN}": "write", f"Bearer {READ_TOKEN}": "read"}
        if header not in roles:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return roles[header]

    def _repo(self, repo_id: str, *, write: bool = False, content: bool = False) -> Repo:
        role = self._role()
        repo = self.server_state.repos.get(repo_id)
        if repo is None or (repo.private and role is None):
            raise RefusalError(401 if role is None else 404, "Repository not found", "RepoNotFound")
        if content and repo.gated and role is None:
            raise RefusalError(401, "Access to model is restricted", "GatedRepo")
        if write and role != "write":
            raise RefusalError(403 if role else 401, "Forbidden: this token cannot write")
        return repo

    def _tree(self, repo_id: str, revision: str, **access: bool) -> tuple[Repo, str, dict[str, Blob]]:
        repo = self._repo(repo_id, **access)
        sha = repo.resolve(revision)
        if sha is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha, repo.commits[sha]

    def create(self) -> None:
        if self._role() != "write":
            raise RefusalError(401 if self._role() is None else 403, "Forbidden: cannot create")
        asked = json.loads(self.body)
        repo_id = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server_state.url}/{repo_id}"}
        if repo_id in self.server_state.repos:
            self._json({"error": "You already created this model repo", **url}, 409)
            return
        private = asked.get("visibility") == "private"
        self.server_state.add_repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json(url)

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        if "license: nonsense" in content:
            self._json({"errors": [{"message": '"license" must be one of the list'}], "warnings": []}, 400)
        else:
            self._json({"errors": [], "warnings": []})

    def info(self, repo_id: str, revision: str) -> None:
        repo, sha, tree = self._tree(repo_id, revision or "main")
        siblings = [
            {"rfilename": path, "size": len(blob.content), "blobId": blob.blob_id} for path, blob in tree.items()
        ]
        self._json({"id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "lastModified": DATE})

    def tree(self, repo_id: str, revision: str) -> None:
        _, _, tree = self._tree(repo_id, revision)
        folders = {path.rsplit("/", 1)[0] for path in tree if "/" in path}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in sorted(folders)]
        entries += [blob.entry(path) for path, blob in sorted(tree.items())]
        start = int(self.query.get("cursor", 0))
        headers = {}
        if start + _PAGE < len(entries):
            query = urllib.parse.urlencode({**self.query, "cursor": start + _PAGE})
            path = urllib.parse.urlsplit(self.path).path
            headers["Link"] = f'<{self.server_state.url}{path}?{query}>; rel="next"'
        self._json(entries[start : start + _PAGE], headers=headers)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        _, sha, tree = self._tree(repo_id, revision, content=True)
        if path not in tree:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        blob, status = tree[path], 200
        content = blob.content
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._bytes(content, status, headers)

    def preupload(self, repo_id: str, revision: str) -> None:
        _, _, tree = self._tree(repo_id, revision, write=True)
        asked = json.loads(self.body)["files"]
        if len(asked) > 256:
            raise RefusalError(413, "too many files")
        answers = []
        for file in asked:
            mode = "lfs" if file["size"] >= _LFS_BYTES else "regular"
            known = {"oid": tree[file["path"]].oid} if file["path"] in tree else {}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        self._json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        repo = self._repo(repo_id, write=True)
        asked = json.loads(self.body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256" or "basic" not in asked["transfers"]:
            raise RefusalError(422, "unsupported transfer")
        objects: list[dict[str, Any]] = []
        for thing in asked["objects"]:
            href = f"{self.server_state.url}/lfs/{repo_id}/{thing['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            known = thing["oid"] in repo.objects
            objects.append({"oid": thing["oid"], "size": thing["size"]} | ({} if known else {"actions": actions}))
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, repo_id: str, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise RefusalError(400, "the content's sha256 is not what was announced")
        self.server_state.repos[repo_id].objects[oid] = self.body
        self._bytes(b"", 200, {})

    def lfs_verify(self, repo_id: str, oid: str) -> None:
        repo, asked = self._repo(repo_id, write=True), json.loads(self.body)
        if asked["oid"] != oid or len(repo.objects.get(oid, b"")) != asked["size"]:
            raise RefusalError(422, "the object is not here, or has another size")
        self._json({})

    def commit(self, repo_id: str, revision: str) -> None:
        repo, head, tree = self._tree(repo_id, revision, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(tree)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if ".." in value["path"].split("/"):
                raise RefusalError(422, "invalid path")
            if key == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"], validate=True), lfs=False)
            elif key == "lfsFile":
                if len(repo.objects.get(value["oid"], b"")) != value["size"]:
                    raise RefusalError(422, f"{value['path']}: its object was never uploaded")
                tree[value["path"]] = Blob(repo.objects[value["oid"]], lfs=True)
            elif key == "deletedFile" and value["path"] in tree:
                del tree[value["path"]]
            else:
                raise RefusalError(400, f"cannot do {key} on {value['path']}")
        pull = self.query.get("create_pr") == "1"
        sha = repo.commit(None if pull else revision, tree)
        answer = {"commitUrl": f"{self.server_state.url}/{repo_id}/commit/{sha}", "commitOid": sha}
        if pull:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = sha
            answer["pullRequestUrl"] = f"{self.server_state.url}/{repo_id}/discussions/{number}"
        self._json(answer)

    def refs(self, repo_id: str) -> None:
        repo = self._repo(repo_id)

        def listed(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        self._json({"branches": listed("heads", repo.branches), "tags": listed("tags", repo.tags), "converts": []})

    def branch(self, repo_id: str, name: str) -> None:
        repo = self._repo(repo_id, write=True)
        if name in repo.branches:
            raise RefusalError(409, "branch exists")
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def tag(self, repo_id: str, revision: str) -> None:
        repo, sha, _ = self._tree(repo_id, revision, write=True)
        name = json.loads(self.body)["tag"]
        if name in repo.tags:
            raise RefusalError(409, "tag exists")
        repo.tags[name] = sha
        self._json({})


_ID = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{_ID}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/api/models/{_ID}/branch/([^/]+)", Handler.branch),
    ("POST", rf"/api/models/{_ID}/tag/([^/]+)", Handler.tag),
    ("GET", rf"/api/models/{_ID}/refs", Handler.refs),
    ("GET", rf"/api/models/{_ID}/tree/([^/]+)", Handler.tree),
    ("GET", rf"/api/models/{_ID}(?:/revision/([^/]+))?", Handler.info),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", rf"/lfs/{_ID}/([0-9a-f]{{64}})", Handler.lfs_put),
    ("POST", rf"/lfs/{_ID}/([0-9a-f]{{64}})/verify", Handler.lfs_verify),
    ("GET HEAD", rf"/{_ID}/resolve/([^/]+)/(.+)", Handler.resolve),
]
