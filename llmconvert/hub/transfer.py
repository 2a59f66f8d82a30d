"""Downloads of single files: resumable, checked, and stoppable at any moment.

The Hub's own client starts a file anew when its process was killed; here the part that arrived stays beside the target
as ``.NAME.incomplete`` and the rest is asked for with an HTTP range.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # no __all__

from llmconvert.errors import CapacityError, HubError, RunInterruptedError
from llmconvert.hub.retry import TRANSPORT_ERROR, Backoff, is_transient, retrying

__all__ = ["RemoteFile", "download_file", "git_blob_id", "iterate_content", "list_files"]

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository at a commit.

    Attributes:
        repo_id: ``org/name``.
        commit: the commit hash.
        name: its path in the repository.
        size: in bytes.
        digest: sha256 of the content for large objects, git's blob id for the others.
        large: whether it is a large object.
    """

    repo_id: str
    commit: str
    name: str
    size: int
    digest: str
    large: bool


def list_files(repo_id: str, commit: str, names: list[str]) -> dict[str, RemoteFile]:
    """Size and hash of the named files, as the Hub lists them. Those that it lacks are left out."""
    if not names:
        return {}
    found = retrying(lambda: HfApi().get_paths_info(repo_id, names, revision=commit), Backoff())
    return {entry.path: as_remote_file(repo_id, commit, entry) for entry in found if isinstance(entry, RepoFile)}


def as_remote_file(repo_id: str, commit: str, entry: RepoFile) -> RemoteFile:
    """An entry of the Hub's listing."""
    digest = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
    return RemoteFile(repo_id, commit, entry.path, entry.size, digest, entry.lfs is not None)


def download_file(
    file: RemoteFile,
    target: Path,
    *,
    advance: Callable[[float], None],
    stop: threading.Event | None = None,
    backoff: Backoff | None = None,
) -> None:
    """Fetch ``file`` to ``target``, continuing where an earlier call was cut off; its hash is checked at the end.

    Two processes that want the same target take turns, and the second one finds it done.

    Args:
        advance: told how many bytes came, those of earlier calls included.
        stop: ends the download soon after it is set; what came stays.

    Raises:
        HubError: what came is not what the Hub lists.
        CapacityError: the disk can't hold it.
        RunInterruptedError: ``stop`` was set.
    """
    partial = target.with_name(f".{target.name}.incomplete")
    try:
        with partial.open("ab+") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            if target.exists():
                advance(file.size)
                partial.unlink(missing_ok=True)
                return
            digest = _digest(file)
            out.seek(0)
            while piece := out.read(_CHUNK):
                digest.update(piece)
            present = out.tell()
            if present > file.size:
                out.truncate(0)
                digest, present = _digest(file), 0
            _require_space(target, file.size - present)
            advance(present)
            for piece in iterate_content(file, start=present, stop=stop, backoff=backoff):
                out.write(piece)
                digest.update(piece)
                advance(len(piece))
            if digest.hexdigest() != file.digest:
                partial.unlink()
                raise HubError(f"{file.repo_id}: {file.name} arrived damaged; run the same command again")
            out.flush()
            partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _full(target) from error


def _digest(file: RemoteFile) -> hashlib._Hash:
    if file.large:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)


def git_blob_id(content: bytes) -> str:
    """What git, and the Hub's listing, call a file that is no large object."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _require_space(target: Path, nbytes: int) -> None:
    if shutil.disk_usage(target.parent).free < nbytes:
        raise _full(target, nbytes)


def _full(target: Path, nbytes: int = 0) -> CapacityError:
    needed = f" {nbytes:,} more bytes are needed," if nbytes else ""
    free = shutil.disk_usage(target.parent).free
    return CapacityError(f"the disk that holds {target.parent} is full:{needed} {free:,} are free; free some space")


def iterate_content(
    file: RemoteFile,
    *,
    start: int = 0,
    end: int | None = None,
    stop: threading.Event | None = None,
    backoff: Backoff | None = None,
) -> Iterator[bytes]:
    """The content from byte ``start`` up to ``end``. Dropped connections are taken up again where they broke off."""
    backoff = backoff or Backoff()
    position, failures = start, 0
    end = file.size if end is None else end
    while position < end:
        try:
            for piece in _request(file, position, end):
                if stop is not None and stop.is_set():
                    raise RunInterruptedError("stopped; the same command continues")
                position += len(piece)
                failures = 0
                yield piece
            if position < end:
                raise HubError(f"{file.repo_id}: {file.name} ended after {position:,} of {end:,} bytes")
        except TRANSPORT_ERROR as error:
            failures += 1
            seconds = backoff.seconds(failures, error)
            if seconds is None or not is_transient(error):
                raise
            time.sleep(seconds)


def _request(file: RemoteFile, position: int, end: int) -> Iterator[bytes]:
    url = hf_hub_url(file.repo_id, file.name, revision=file.commit)
    # Compressed on the way, a range would mean other bytes.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if position or end < file.size:
        headers["Range"] = f"bytes={position}-" + (str(end - 1) if end < file.size else "")
    seconds = huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    with huggingface_hub.get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
        if response.status_code >= 400:
            response.read()
        hf_raise_for_status(response)
        # A server that knows no ranges sends everything.
        skip = position if response.status_code == 200 else 0
        left = end - position
        for piece in response.iter_bytes(_CHUNK):
            if not left:
                return
            if skip < len(piece):
                wanted = piece[skip : skip + left]
                left -= len(wanted)
                yield wanted
            skip = max(0, skip - len(piece))
