"""What the disk owes a writer: bytes that stay when it says so, and errors in words."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from llmconvert.errors import CapacityError, LlmconvertError, MachineError, OutputError

__all__ = ["NOT_ALLOWED", "disk_error", "put_in_place", "require_slashes", "sync_directory"]

#: A write that nobody can do, however often it is tried.
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def disk_error(error: OSError, path: Path, nbytes: int | None = None) -> LlmconvertError:
    """What a failed write (of ``nbytes``) to ``path`` means, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free, needed = "", "" if nbytes is None else f" for {nbytes:,} bytes"
        with suppress(OSError):
            free = f", {shutil.disk_usage(path.parent).free:,} bytes are free"
        return CapacityError(f"{path}: no space{needed} ({error.strerror}){free}; free some, or write to another disk")
    if error.errno in NOT_ALLOWED:
        return OutputError(f"{path}: cannot be written: {error.strerror}")
    gone = "" if path.parent.is_dir() else f", {path.parent} is gone"
    return MachineError(f"{path}: cannot be written: {error.strerror}{gone}; run the same command to continue")


def require_slashes(path: Path) -> None:
    """Refuse a place to be made whose name has a backslash: nobody means one as a letter of a name, as it is here.

    Raises:
        OutputError: with the path that is meant. Folders that are there already may be called as they like.
    """
    made = path
    while not os.path.lexists(made) and made != made.parent:
        if "\\" in made.name:
            meant = str(path).replace("\\", "/")
            raise OutputError(f"{path}: has a backslash; folders are divided by slashes here: {meant}")
        made = made.parent


def put_in_place(staging: Path, path: Path) -> None:
    """Rename what is finished to where it belongs.

    Raises:
        OutputError: something is in its place, or it may not be put there.
        MachineError: the disk fails, or a directory is gone.
    """
    try:
        os.rename(staging, path)
    except OSError as error:
        text = f"{path}: cannot be put in place: {error.strerror}"
        if error.errno in (*NOT_ALLOWED, errno.ENOTEMPTY, errno.EEXIST, errno.EXDEV):
            raise OutputError(f"{text}; the result is in {staging}") from error
        raise MachineError(f"{text}; run the same command to continue") from error


def sync_directory(path: Path) -> None:
    """Force the entries of a directory to disk: what was created, renamed and removed in it.

    Raises:
        MachineError: the disk fails, or the directory is gone.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise MachineError(f"{path}: cannot be forced to disk: {error.strerror}; run the same command again") from error
