"""Text files that a user names: read whole, at a bounded cost, with the line ends that text mode gives."""

from __future__ import annotations

import stat
from pathlib import Path

__all__ = ["local_path", "read_text", "universal_newlines"]


def local_path(name: str | Path) -> Path:
    """The path that a user means; ``~name`` of a user that this machine doesn't know stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def read_text(path: Path, most: int) -> str:
    """A UTF-8 file of ``most`` bytes at most, without byte order mark.

    Every line ends in ``\\n``, whichever of ``\\r\\n``, ``\\r`` and ``\\n`` stands in the file, as with universal
    newlines: other tools read text so, and a carriage return would be a token of its own. A pipe is read too.

    Raises:
        ValueError: it can't be read, is no file of text, or is longer; the message is the reason.
    """
    try:
        kind = path.stat().st_mode
        raw = _beginning(path, most + 1) if stat.S_ISREG(kind) or stat.S_ISFIFO(kind) else None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"cannot be read: {error}") from error
    if raw is None:
        raise ValueError(f"is {'a directory' if stat.S_ISDIR(kind) else 'a device'}; expected a file of text")
    if len(raw) > most:
        raise ValueError(f"holds more than {most:,} bytes; give a part of it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start:,} is not UTF-8 text; convert the file to UTF-8") from error
    return universal_newlines(text)


def universal_newlines(text: str) -> str:
    """The text with every line end as ``\n``, as text mode reads it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _beginning(path: Path, nbytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(nbytes)
