"""Locks between processes: who builds an output or a stage holds its lock, who reads a stage keeps it from removal.

The kernel holds them (``flock``) and lets go when the process ends, however it ends; a lock file that a killed run
left behind blocks nobody.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llmconvert.errors import LlmconvertError, MachineError, OutputError
from llmconvert.storage.disk import NOT_ALLOWED

__all__ = ["Readers", "clear_locks", "lock_path", "locked", "unread"]

_POLL_SECONDS = 0.1


def lock_path(path: Path) -> Path:
    """The hidden sibling of ``path`` that carries its lock."""
    absolute = path.absolute()
    return absolute.with_name(f".{absolute.name}.lock")


@contextmanager
def locked(path: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of the file or directory ``path``, which need not exist; its parents are created.

    Args:
        path: what is about to be built.
        wait: called once with the reason where another process holds the lock, before waiting for it. Without it, a
            lock that is held is refused.

    Raises:
        OutputError: another process holds it, or its file may not be written.
        MachineError: the disk fails.
    """
    file = lock_path(path)
    lock = FileLock(file, thread_local=False, fallback_to_soft=False, on_acquired=_sign)
    try:
        if not _try(lock):
            reason = f"{path}: another run (process {_holder(file)}) is using it"
            if wait is None:
                raise OutputError(f"{reason}; wait for it, or name another place for this one")
            wait(f"{reason}; waiting")
            while not _try(lock):
                time.sleep(_POLL_SECONDS)
    except OSError as error:
        text = f"{path}: cannot be used: its lock {file.name} cannot be taken: {error.strerror or error}"
        if error.errno in (*NOT_ALLOWED, errno.EEXIST, errno.ENOENT):
            raise OutputError(text) from error
        raise MachineError(f"{text}; run the same command again") from error
    try:
        yield
    finally:
        # Removed while it is held: who waits for this very file sees that it is gone, and makes a new one.
        with suppress(OSError):  # one that stays blocks nobody
            file.unlink()
        lock.release()


def clear_locks(directory: Path) -> None:
    """Remove the lock files that killed runs left in ``directory``; those that are held stay."""
    for file in directory.glob(".*.lock"):
        path = file.with_name(file.name.removeprefix(".").removesuffix(".lock"))
        with suppress(LlmconvertError), locked(path):
            pass


@contextmanager
def unread(path: Path) -> Iterator[bool]:
    """Whether no :class:`Readers` hold the file ``path``; if so, none can begin to while the block runs."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # network file systems want it writable
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


class Readers:
    """Files that this process reads and nobody may remove, see :func:`unread`. Any number of processes may read."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}

    def hold(self, path: Path) -> bool:
        """Take part in reading ``path``, once however often; False if it is not there.

        Raises:
            MachineError: it is there and cannot be read.
        """
        if path in self._fds:
            return True
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise MachineError(f"{path}: cannot be read: {error.strerror}; run the same command again") from error
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink == 0:  # removed just now
            os.close(fd)
            return False
        self._fds[path] = fd
        return True

    def release(self, path: Path) -> None:
        """Leave ``path``, if it is held."""
        if path in self._fds:
            os.close(self._fds.pop(path))

    def close(self) -> None:
        """Leave all."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _try(lock: FileLock) -> bool:
    """One attempt; the directory of the lock's file may go whenever another process finds it empty."""
    while True:
        try:
            Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            if os.path.lexists(lock.lock_file):
                return False
            _require_file(Path(lock.lock_file))
        except FileNotFoundError:
            continue
        else:
            return True


def _require_file(file: Path) -> None:
    """Make the file of a lock that was let go just now; where none can be made, which looks the same, this fails."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC))
    except FileNotFoundError:
        if file.parent.is_dir():
            raise


def _sign(fd: int) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)


def _holder(file: Path) -> str:
    try:
        return file.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
