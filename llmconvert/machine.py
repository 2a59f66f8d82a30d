"""Failures of the machine, told from those of a model or a recipe: its disk, its memory, a process that was killed.

They are never a measurement, nor a reason to throw away what was finished.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from llmconvert.errors import ChangedError, LlmconvertError, MachineError

__all__ = ["machine_errors", "of_machine", "out_of_memory"]

# What the system says of a name, not of the machine: nothing is there, or it is no file.
_OF_THE_NAME = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
)
# Libraries written in C++ and Rust give neither a MemoryError nor an errno.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "Cannot allocate memory")
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


def of_machine(error: BaseException | None) -> bool:
    """Whether this machine failed, in an error or in what caused it, so that it says nothing about model or recipe.

    A file that does not exist, or is none, is no failure of the machine; one that changed while it was read counts.
    """
    return _culprit(error) is not None


@contextmanager
def machine_errors() -> Iterator[None]:
    """What the system refuses while the block runs, and nobody there has put into words, ends it in one line.

    Raises:
        MachineError: a file operation failed, or there was no memory.
    """
    try:
        yield
    except (LlmconvertError, BrokenPipeError):
        raise
    except Exception as error:
        culprit = error if isinstance(error, OSError) and error.errno is not None else _culprit(error)
        if culprit is None:
            raise
        raise MachineError(f"{_words(culprit)}; look after it, and run the same command to continue") from error


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that no more memory was given."""
    return any(_no_memory(one) for one in _chain(error))


def _culprit(error: BaseException | None) -> BaseException | None:
    """The error of the machine among an error and its causes; None without one."""
    return next((one for one in _chain(error) if _is_of_machine(one)), None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it was raised from or while handling."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_of_machine(error: BaseException) -> bool:
    number = _errno(error)
    if number is not None and number not in _OF_THE_NAME:
        return True
    return isinstance(error, MachineError | ChangedError) or _no_memory(error)


def _no_memory(error: BaseException) -> bool:
    said = isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
    return said or isinstance(error, MemoryError) or _errno(error) == errno.ENOMEM


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _RUST_ERRNO.search(str(error))
    return int(found[1]) if found is not None else None


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        names = " → ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names or 'a file operation'}: {error.strerror}"
    text = str(error).strip()
    first = text.splitlines()[0] if text else ""
    return f"out of memory: {first}" if isinstance(error, MemoryError) and first else first or "out of memory"
