"""What the files of a finished directory hold: size and SHA-256 of each, recorded once and checked before use.

Size and time of a file don't tell: one that is overwritten in place, restored or copied over may keep both. So files
are read, several at a time, at about the speed of the disk; a process that meets a file again, unchanged since (by
inode and change time, which no program can set), remembers.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from llmconvert.errors import MachineError
from llmconvert.progress import SILENT, Bytes, Progress

__all__ = ["Contents", "FileContent", "Hashes", "listing"]

_READERS = min(4, os.cpu_count() or 1)
# Less is read before anybody could look.
_SHOWN_NBYTES = 1 << 28
# A file written to within the clock's tick keeps its time: what changed so shortly before is not remembered.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class FileContent:
    """Size and SHA-256 (hex) of a file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Contents:
    """Of a directory's files, by relative name."""

    files: Mapping[str, FileContent]

    @property
    def digest(self) -> str:
        """SHA-256 in hex over names, sizes and hashes of all files."""
        return hashlib.sha256(json.dumps(self.to_mapping(), sort_keys=True).encode()).hexdigest()

    def to_mapping(self) -> dict[str, dict[str, Any]]:
        """As JSON values."""
        return {name: asdict(content) for name, content in self.files.items()}

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> Self:
        """What :meth:`to_mapping` gave.

        Raises:
            TypeError, ValueError: it is something else.
        """
        return cls(
            {str(name): FileContent(int(entry["nbytes"]), str(entry["sha256"])) for name, entry in value.items()}
        )

    def below(self, folder: str) -> Contents:
        """Of the files in a folder, by their names in it."""
        start = f"{folder}/"
        inside = ((name, content) for name, content in self.files.items() if name.startswith(start))
        return Contents({name.removeprefix(start): content for name, content in inside})


class Hashes:
    """SHA-256 of files, each read once while it stays as it is.

    Args:
        progress: where reading is shown that takes long.
    """

    def __init__(self, progress: Progress = SILENT) -> None:
        self._progress = progress
        self._known: dict[tuple[int, ...], str] = {}

    def read(self, directory: Path, *, but: str = "") -> Contents:
        """What is in a directory, hidden files and the file ``but`` left out.

        Raises:
            MachineError: a file cannot be read.
        """
        sizes = {name: size for name, size in listing(directory).items() if name != but}
        found = self._hash(directory, sizes)
        return Contents({name: FileContent(size, found[name]) for name, size in sizes.items()})

    def damage(self, directory: Path, recorded: Contents, *, but: str = "", hidden: bool = False) -> str:
        """How a directory differs from what was recorded of it, empty if it doesn't.

        Args:
            but: a file that does not count.
            hidden: whether hidden files count.

        Raises:
            MachineError: a file cannot be read; that says nothing of what it holds.
        """
        sizes = {name: size for name, size in listing(directory, hidden=hidden).items() if name != but}
        for name, content in recorded.files.items():
            if name not in sizes:
                return f"{name} is missing"
            if sizes[name] != content.nbytes:
                return f"{name} has {sizes[name]:,} bytes, {content.nbytes:,} were written"
        if added := sorted(sizes.keys() - recorded.files.keys()):
            return f"{added[0]} was added"
        found = self._hash(directory, sizes)
        changed = [name for name, content in recorded.files.items() if found[name] != content.sha256]
        return f"{changed[0]} holds other bytes than were written" if changed else ""

    def _hash(self, directory: Path, sizes: Mapping[str, int]) -> dict[str, str]:
        total = sum(sizes.values())
        if total < _SHOWN_NBYTES:
            return {name: self._digest(directory / name) for name in sizes}
        found: dict[str, str] = {}
        pool = ThreadPoolExecutor(_READERS)
        try:
            futures = {name: pool.submit(self._digest, directory / name) for name in sizes}
            with self._progress.task(
                f"checking {directory.name.strip('.').removesuffix('.partial')}", Bytes(total)
            ) as task:
                for name, future in futures.items():
                    found[name] = future.result()
                    task.advance(sizes[name], name)
        finally:
            pool.shutdown(cancel_futures=True)
        return found

    def _digest(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
                if identity in self._known:
                    return self._known[identity]
                settled = time.time_ns() - status.st_ctime_ns > _SETTLED_NS
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise MachineError(f"{path}: cannot be read: {error.strerror}; run the same command again") from error
        if settled:
            self._known[identity] = digest
        return digest


def listing(directory: Path, *, hidden: bool = False) -> dict[str, int]:
    """Relative name → bytes of every file below a directory, in order; hidden files and folders only if asked for.

    Raises:
        MachineError: a directory cannot be read.
    """
    return dict(sorted(_entries(directory, "", hidden)))


def _entries(directory: Path, prefix: str, hidden: bool) -> Iterator[tuple[str, int]]:
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith(".") and not hidden:
                    continue
                if entry.is_dir():
                    yield from _entries(Path(entry.path), f"{prefix}{entry.name}/", hidden)
                elif entry.is_file():
                    yield f"{prefix}{entry.name}", entry.stat().st_size
    except OSError as error:
        raise MachineError(f"{directory}: cannot be read: {error.strerror}; run the same command again") from error
