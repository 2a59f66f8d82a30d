"""An append-only record of finished work that survives being killed in the middle of a line.

One JSON object per line, each line with its own checksum. A torn or damaged tail is dropped when the journal is
opened, so what is read back is exactly what was completely written.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.storage.disk import disk_error, sync_directory

__all__ = ["Journal"]


class Journal:
    """The entries of one job.

    Args:
        path: the file; created if missing. A damaged tail is cut off.

    Raises:
        MachineError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            content = path.read_bytes() if path.exists() else b""
            self.entries, good = _parse(content)
            if good < len(content):
                os.truncate(path, good)
        except OSError as error:
            raise disk_error(error, path) from error

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add an entry; it is on disk when this returns.

        Raises:
            MachineError: the disk fails, or it is full.
        """
        body = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        line = f"{zlib.crc32(body.encode()):08x} {body}\n".encode()
        created = not self._path.exists()
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise disk_error(error, self._path, len(line)) from error
        if created:
            sync_directory(self._path.parent)
        self.entries.append(dict(entry))


def _parse(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The intact entries, and where the last of them ends."""
    entries: list[dict[str, Any]] = []
    position = 0
    for line in content.splitlines(keepends=True):
        checksum, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != f"{zlib.crc32(body):08x}".encode():
            break
        entries.append(json.loads(body))
        position += len(line)
    return entries, position
