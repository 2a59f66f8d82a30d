"""File operations of this process that fail, or kill it: a wrapper around those of ``os`` and ``open``.

What is met: opening, creating, reading and writing through descriptors, reserving, cutting, forcing to disk, renaming,
linking, removing, listing and looking up (``stat``) files below one directory, in Python code of any package. What is
not: reads and writes inside native code (safetensors' mapped files, tokenizers) and through Python's buffered file
objects, which are met when they are opened and when they are forced to disk; imports of modules; the network.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["ERRORS", "FileFault", "install"]

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
_WRAPPED = (
    *("open", "pwrite", "preadv", "write", "ftruncate", "truncate", "posix_fallocate", "fsync", "fdatasync"),
    *("rename", "replace", "link", "unlink", "remove", "mkdir", "rmdir", "listdir", "scandir", "stat"),
)
# Operations on two names, of which the second is what comes to be.
_ON_TWO = ("rename", "replace", "link")


@dataclass(frozen=True, slots=True)
class FileFault:
    """What happens at a file operation.

    Attributes:
        at: number of the operation, from 1; 0 for none.
        kind: ``before`` kills the process instead of the operation, ``after`` behind it, and a write half-way;
            otherwise the name of the error that it fails with.
        lasting: whether every operation from there on fails.
    """

    at: int = 0
    kind: Literal["before", "after", "EIO", "ENOSPC", "EACCES"] = "before"
    lasting: bool = False


class _Counter:
    """Counts operations below a directory, and lets the fault happen."""

    def __init__(self, root: str, fault: FileFault, met: Callable[[str], None]) -> None:
        self._root = root
        self._fault = fault
        self._met = met
        self.names: list[str] = []

    def concerns(self, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> bool:
        target = args[1] if name in _ON_TWO and len(args) > 1 else args[0] if args else "."
        folder = options.get("dir_fd") or options.get("src_dir_fd")
        place = target if isinstance(target, int) else folder
        base = os.readlink(f"/proc/self/fd/{place}") if place is not None else os.getcwd()  # noqa: PTH109, PTH115
        path = base if isinstance(target, int) else f"{base}/{os.fsdecode(target)}"
        return (os.fsdecode(target) if str(target).startswith("/") else path).startswith(self._root)

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        try:
            concerned = self.concerns(name, args, options)
        except (OSError, TypeError):
            concerned = False
        if not concerned:
            return function(*args, **options)
        self.names.append(name)
        fault, number = self._fault, len(self.names)
        if not fault.at or number < fault.at or (number > fault.at and not fault.lasting):
            return function(*args, **options)
        if number == fault.at:
            self._met(name)
        if fault.kind in ERRORS:
            code = ERRORS[fault.kind]
            raise OSError(code, os.strerror(code), args[0] if args and not isinstance(args[0], int) else None)
        if fault.kind == "after":
            if name in ("pwrite", "write"):
                args = (args[0], args[1][: len(args[1]) // 2], *args[2:])
            function(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return None


def install(root: str, fault: FileFault, met: Callable[[str], None]) -> list[str]:
    """Wrap the operations on files below ``root``, for the rest of this process.

    Args:
        met: told the operation's name when the fault happens.

    Returns:
        The names of the operations, which grows as they come.
    """
    counter = _Counter(root, fault, met)

    def wrapped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            return counter.call(name, function, args, options)

        return call

    # What is asked with `in os.supports_fd` and the like was asked when the modules were imported.
    for name in _WRAPPED:
        setattr(os, name, wrapped(name, getattr(os, name)))
    opened = wrapped("open", io.open)
    setattr(builtins, "open", opened)  # noqa: B010 (a declared function)
    setattr(io, "open", opened)  # noqa: B010
    return counter.names
