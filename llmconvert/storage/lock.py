"""A directory that one process at a time may work in.

The lock is ``flock`` on a file inside it: the kernel lets go of it when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Self

from llmconvert.errors import OutputError

__all__ = ["LOCK_NAME", "DirectoryLock"]

#: The file in a locked directory that carries the lock.
LOCK_NAME = ".lock"


class DirectoryLock:
    """Creates ``directory`` if need be and locks it; :meth:`release` removes it again if nothing was put in it.

    Raises:
        OutputError: it cannot be written, or another process has it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd: int | None = _acquire(directory)

    def release(self) -> None:
        """Unlock. Safe to call twice."""
        if self._fd is None:
            return
        if self._directory.is_dir() and [entry.name for entry in self._directory.iterdir()] == [LOCK_NAME]:
            (self._directory / LOCK_NAME).unlink(missing_ok=True)
            self._directory.rmdir()
        os.close(self._fd)
        self._fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def _acquire(directory: Path) -> int:
    path = directory / LOCK_NAME
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{directory}: cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise OutputError(
                f"{directory}: another run (process {holder}) is using it; "
                "wait for it, or give this one another directory"
            ) from error
        if _still_there(path, fd):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
            return fd
        os.close(fd)


def _still_there(path: Path, fd: int) -> bool:
    """Whether the locked file is the one under ``path``: its last holder may have removed it since it was opened."""
    try:
        return path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        return False
