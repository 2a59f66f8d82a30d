"""Files of a repository, and whose they are: the artifact's, an earlier version's of it, or somebody else's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from llmconvert.errors import HubError
from llmconvert.hub.plan import PushPlan
from llmconvert.hub.retry import Backoff, retrying
from llmconvert.hub.transfer import RemoteFile, as_remote_file, git_blob_id, iterate_content

__all__ = [
    "MANIFEST",
    "Content",
    "Listing",
    "Survey",
    "hash_files",
    "list_repository",
    "mismatch",
    "require_clear",
    "survey",
]

#: What a push records of itself, below the artifact's folder: the hashes of every file it sent.
MANIFEST = "llmconvert/upload.json"
# Version 1 had a file's sha256 alone, which the Hub lists for large objects only; the small ones had to be fetched.
_SCHEMA = "llmconvert.upload/2"
# Larger files are large objects on the Hub in any case, and need no git blob id.
_BLOB_BYTES = 20_000_000
# What loaders take for weights, or for the list of them.
_WEIGHTS = (".safetensors", ".safetensors.index.json")

#: Path → file, at one commit.
Listing = Mapping[str, RemoteFile]


@dataclass(frozen=True, slots=True)
class Content:
    """What one file is to hold: its size and sha256, and where it is, on disk or in memory."""

    size: int
    sha256: str
    source: Path | bytes
    blob_id: str | None = None

    @classmethod
    def of(cls, data: bytes, source: Path | None = None) -> Content:
        return cls(len(data), hashlib.sha256(data).hexdigest(), source or data, git_blob_id(data))

    @classmethod
    def of_file(cls, path: Path) -> Content:
        """Hashed in pieces where it is large."""
        if (size := path.stat().st_size) <= _BLOB_BYTES:
            return cls.of(path.read_bytes(), path)
        with path.open("rb") as opened:
            return cls(size, hashlib.file_digest(opened, "sha256").hexdigest(), path)

    def equals(self, file: RemoteFile) -> bool:
        """Whether the Hub lists the same."""
        return (file.size, file.digest) == (self.size, self.sha256 if file.large else self.blob_id)


@dataclass(frozen=True, slots=True)
class _Sent:
    """What an earlier push says it sent under a name; the git blob id is not always known."""

    sha256: str
    blob_id: str | None

    def equals(self, file: RemoteFile) -> bool:
        """Whether the Hub still lists it; a small file is fetched where only its sha256 is known."""
        if file.large:
            return file.digest == self.sha256
        if self.blob_id is not None:
            return file.digest == self.blob_id
        return hashlib.sha256(b"".join(iterate_content(file))).hexdigest() == self.sha256


@dataclass(frozen=True, slots=True)
class Survey:
    """Whose the files at a commit are, of those in the artifact's folder (its root: in the whole repository).

    Attributes:
        stale: sent by an earlier push, unchanged since, and not part of this one; they go.
        foreign: of other origin, and not part of this push.
        edited: sent by an earlier push and changed by somebody since; this push would write over that.
        occupied: never sent by an earlier push, and this one would write over it.
    """

    stale: tuple[str, ...]
    foreign: tuple[str, ...]
    edited: tuple[str, ...]
    occupied: tuple[str, ...]


def list_repository(api: HfApi, repo_id: str, commit: str, backoff: Backoff) -> dict[str, RemoteFile]:
    """Every file of a repository at a commit."""

    def request() -> list[RepoFile]:
        entries = api.list_repo_tree(repo_id, recursive=True, revision=commit)
        return [entry for entry in entries if isinstance(entry, RepoFile)]

    return {entry.path: as_remote_file(repo_id, commit, entry) for entry in retrying(request, backoff)}


def hash_files(plan: PushPlan) -> dict[str, Content]:
    """Path → content of everything a push sends: the plan's files, and the manifest that lists them."""
    contents: dict[str, Content] = {}
    for file in plan.files:
        source = file.source
        contents[file.name] = Content.of(source) if isinstance(source, bytes) else Content.of_file(source)
    files = {
        name.removeprefix(plan.folder): {"sha256": content.sha256, "blob_id": content.blob_id}
        for name, content in contents.items()
    }
    manifest = (json.dumps({"schema": _SCHEMA, "files": files}, indent=2, sort_keys=True) + "\n").encode()
    contents[plan.folder + MANIFEST] = Content.of(manifest)
    return contents


def survey(listing: Listing, plan: PushPlan, contents: Mapping[str, Content]) -> Survey:
    """Sort the files that are there already.

    Raises:
        HubError: the connection failed while the earlier push's manifest was read.
    """
    earlier = _earlier_push(listing, plan.folder)
    stale: list[str] = []
    foreign: list[str] = []
    edited: list[str] = []
    occupied: list[str] = []
    for name, file in listing.items():
        if not name.startswith(plan.folder) or name in (".gitattributes", plan.folder + MANIFEST):
            continue
        if name in contents and contents[name].equals(file):
            continue
        sent = earlier.get(name)
        ours = sent is not None and sent.equals(file)
        if name not in contents:
            (stale if ours else foreign).append(name)
        elif not ours:
            (occupied if sent is None else edited).append(name)
    return Survey(tuple(stale), tuple(foreign), tuple(edited), tuple(occupied))


def _earlier_push(listing: Listing, folder: str) -> dict[str, _Sent]:
    """Path → what the last push of this artifact sent; empty if there was none."""
    manifest = listing.get(folder + MANIFEST)
    if manifest is None:
        return {}
    try:
        value = json.loads(b"".join(iterate_content(manifest)))
        return {folder + name: _sent(entry) for name, entry in value["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _sent(entry: str | Mapping[str, str | None]) -> _Sent:
    if isinstance(entry, str):  # version 1
        return _Sent(entry, None)
    blob_id = entry["blob_id"]
    return _Sent(str(entry["sha256"]), None if blob_id is None else str(blob_id))


def require_clear(plan: PushPlan, found: Survey, *, shared: bool) -> None:
    """Refuse to write over what somebody else put there, and to publish beside weights that a loader would take
    instead of the artifact's, or mix with them.

    Args:
        shared: whether the commit goes to a branch that was there already, where what it replaces is lost to readers;
            a new branch and a pull request leave it where it was.

    Raises:
        HubError: naming the first such file.
    """
    if found.occupied and shared:
        more = f" and {len(found.occupied) - 1} more" if len(found.occupied) > 1 else ""
        raise HubError(
            f"{plan.repo_id}: {found.occupied[0]}{more} is there already and was not published from here; publish to a "
            "branch, a folder or a repository of its own, or write over it with --replace"
        )
    if found.edited:
        raise HubError(
            f"{plan.repo_id}: {found.edited[0]} was changed since it was published; take the change over, "
            "or write over it with --replace"
        )
    beside = [name for name in found.foreign if name.endswith(_WEIGHTS) and "/" not in name.removeprefix(plan.folder)]
    if beside:
        more = f" and {len(beside) - 1} more" if len(beside) > 1 else ""
        raise HubError(
            f"{plan.repo_id}: {beside[0]}{more} would be loaded instead of the artifact or mixed with it; "
            "--replace removes what is not the artifact's, or publish to a branch, a folder or a repository of its own"
        )


def mismatch(listing: Listing, contents: Mapping[str, Content], removed: tuple[str, ...] = ()) -> str | None:
    """What of a listing is not as a push meant it to be, in words; None if everything is."""
    for name, content in contents.items():
        file = listing.get(name)
        if file is None:
            return f"{name} is missing"
        if not content.equals(file):
            expected = content.sha256 if file.large else content.blob_id
            return (
                f"{name} has {file.size:,} bytes and hash {file.digest}, expected {content.size:,} bytes and {expected}"
            )
    left = [name for name in removed if name in listing]
    return f"{left[0]} is still there" if left else None
