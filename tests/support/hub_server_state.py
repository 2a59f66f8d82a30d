"""What the loopback Hub keeps: repositories in memory, tokens, and the faults it was told to commit."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WRITE_TOKEN = "hf_" + "w" * 34
READ_TOKEN = "hf_" + "r" * 34
EXPIRED_TOKEN = "hf_" + "e" * 34
DATE = "2025-01-01T00:00:00.000Z"
#: Files from this size on are large objects, and go through LFS or Xet.
LFS_BYTES = 1000


@dataclass(frozen=True)
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
    #: False, or who decides: ``"auto"`` or ``"manual"``.
    gated: bool | str = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)
    #: References of those that are merged or closed.
    closed: set[str] = field(default_factory=set)
    #: Title and description of every commit that came through the API.
    messages: dict[str, tuple[str, str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    #: ``(object, part number)`` → content, until the parts are put together.
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)

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
class Collection:
    title: str
    owner: str
    private: bool
    #: Repositories, in the order in which they came.
    items: list[str] = field(default_factory=list)


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose line (``"GET /path bytes=5-"``) matches ``pattern``.

    Attributes:
        status: answer with this, with ``message``, and ``retry_after`` in a ``Retry-After`` header.
        hook: called before the request's body is read.
        drop_after: close the connection after this many bytes of the body, of the request if it has one, else of
            the response.
        lose_response: do what was asked and close the connection without an answer.
        late_status: do what was asked and answer with this nevertheless.
        slow_seconds: sleep this long per 64 KiB of body.
    """

    pattern: str
    status: int = 0
    message: str = ""
    times: int = 1_000_000
    hook: Callable[[], object] | None = None
    retry_after: str | None = None
    drop_after: int | None = None
    lose_response: bool = False
    late_status: int = 0
    slow_seconds: float = 0.0


class RefusalError(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after = status, message, code, retry_after

    @property
    def headers(self) -> dict[str, str]:
        found = {"X-Error-Message": self.message, "X-Error-Code": self.code, "Retry-After": self.retry_after}
        return {key: value for key, value in found.items() if value is not None}


class HubState:
    """The repositories, the faults to commit and the log of requests (``"GET /path bytes=5-"``).

    ``part_bytes`` makes objects above that size multipart; ``store_bytes`` is the size of the Hub's disk.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.url = ""
        self.generation = 0
        self.reset()

    def reset(self) -> None:
        """An empty Hub at the same address."""
        self.repos: dict[str, Repo] = {}
        #: Old name → new name of repositories.
        self.renamed: dict[str, str] = {}
        #: Paths that a repository's .gitignore leaves out.
        self.ignored: set[str] = set()
        #: What the storage says of every new object, instead of where to put it.
        self.refused_object = ""
        #: The path below which everything lies, with a slash before it.
        self.prefix = ""
        #: By address.
        self.collections: dict[str, Collection] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        #: Bytes of all bodies that came in, and that went out.
        self.received = self.sent = 0
        #: Entries per page of a listing; the real Hub's pages are a thousand.
        self.page = 3
        self.part_bytes: int | None = None
        self.store_bytes: int | None = None
        #: Where large objects are uploaded to, if not to the Hub's own address.
        self.storage: str | None = None
        #: sha256 → what is sent in place of that content.
        self.served_instead: dict[str, bytes] = {}
        #: Of the answer to whoami: ``orgs``, and what to say of the ``token``.
        self.account: dict[str, Any] = {}

    def add_repo(self, repo_id: str, files: dict[str, bytes], **settings: Any) -> Repo:
        repo = self.repos[repo_id] = Repo(**settings)
        repo.commit("main", {path: Blob(data, len(data) >= LFS_BYTES) for path, data in files.items()})
        return repo

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader sees."""
        repo = self.repos[repo_id]
        return {path: blob.content for path, blob in repo.commits[repo.resolve(revision) or ""].items()}

    def drop_pending(self) -> None:
        """Nobody waits any more for the answers to requests under way, and what they ask for is not done."""
        with self.lock:
            self.generation += 1

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.log)

    def store(self, repo: Repo, oid: str, content: bytes) -> None:
        """Keep a large object whose hash was announced as ``oid``."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, "the content's sha256 is not what was announced")
        used = sum(len(known) for other in self.repos.values() for known in other.objects.values())
        if self.store_bytes is not None and used + len(content) > self.store_bytes:
            raise RefusalError(507, "Insufficient Storage")
        repo.objects[oid] = content

    def take_faults(self, line: str) -> list[Fault]:
        """The faults that this request meets."""
        with self.lock:
            met = [fault for fault in self.faults if fault.times > 0 and re.search(fault.pattern, line)]
            for fault in met:
                fault.times -= 1
            return met
