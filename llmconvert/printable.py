"""Text of others, for a terminal or a page: names of tensors, files and architectures may command a terminal."""

from __future__ import annotations

import re

__all__ = ["printable"]

# Controls but line ends and tabs, which begin a terminal's commands; what turns the direction of writing; and halves of
# surrogate pairs, which file names have where they are not UTF-8 and no stream can write.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""The text with what would command a terminal written out: ``\x1b[2J``."""
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
