"""Rows that files of one model have in common: encoded for the first of them, and copied into the others.

The files of a set differ in most types, not in all: nearly every mix has the output head in Q6_K, and many linears have
the same type in two of them. What is kept is where the bytes lie, not the bytes themselves: they are read back from the
file that has them, a little at a time. What an earlier run has written is not known, and is encoded anew.
"""

from __future__ import annotations

from collections.abc import Hashable

from llmconvert.storage.writer import TensorWriter

__all__ = ["Encoded"]

_COPY_NBYTES = 1 << 20


class Encoded:
    """What was encoded in one pass, by all that decides its bytes; it lies at the same place of a tensor everywhere."""

    def __init__(self) -> None:
        self._writers: dict[Hashable, TensorWriter] = {}

    def copy(self, key: Hashable, writer: TensorWriter, name: str, offset: int, nbytes: int) -> bool:
        """Write a part of a tensor, if another file has it; whether it has.

        Args:
            key: what decides the bytes.
            writer: of the file that is to have them too.
            name: of the tensor.
            offset, nbytes: where they lie in it.
        """
        other = self._writers.get(key)
        if other is None:
            return False
        for start in range(offset, offset + nbytes, _COPY_NBYTES):
            stop = min(start + _COPY_NBYTES, offset + nbytes)
            writer.write_bytes(name, start, memoryview(other.read_bytes(name, start, stop - start)))
        return True

    def keep(self, key: Hashable, writer: TensorWriter) -> None:
        """Remember that a file has what ``key`` decides."""
        self._writers.setdefault(key, writer)
