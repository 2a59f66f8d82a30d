"""Where every batch's hidden state is kept at the entry of the block to come: in memory, or on disk to resume from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from llmconvert.errors import CapacityError

__all__ = ["DiskStates", "MemoryStates", "States", "states_present"]

_PARITIES = ("even", "odd")


class States(Protocol):
    """Block inputs by block and batch. Those of a block may be forgotten once those of the one after are complete."""

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        """Keep the input of ``block`` for ``batch``, shape ``[1, length, hidden size]``."""

    def get(self, block: int, batch: int) -> torch.Tensor:
        """What was put."""


class MemoryStates:
    """Block inputs in memory; a batch's state goes when its next one comes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        self._kept.pop((block - 1, batch), None)
        self._kept[block, batch] = hidden

    def get(self, block: int, batch: int) -> torch.Tensor:
        return self._kept[block, batch]


class DiskStates:
    """Block inputs in two files that take turns, so that those of a block stay until those of the next are synced.

    Args:
        directory: where the files go; their space is reserved at once.
        lengths: tokens of each batch.
        hidden_size: width of the hidden state.
        dtype: of the hidden state.
        name: what the files' names begin with.

    Raises:
        CapacityError: the disk cannot hold them.
    """

    def __init__(
        self, directory: Path, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype, name: str = "states"
    ) -> None:
        self._shapes = [(1, length, hidden_size) for length in lengths]
        self._dtype = dtype
        row = hidden_size * dtype.itemsize
        self._offsets = [0]
        for length in lengths:
            self._offsets.append(self._offsets[-1] + length * row)
        self._files: list[int] = []
        for parity in _PARITIES:
            path = directory / f"{name}-{parity}.bin"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._files.append(fd)
            try:
                os.posix_fallocate(fd, 0, self._offsets[-1])
            except OSError as error:
                self.close()
                raise CapacityError(
                    f"{path}: no space for {self._offsets[-1]:,} bytes of activations: {error.strerror}"
                ) from error

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        data = hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        position = self._offsets[batch]
        while data:
            count = os.pwrite(self._files[block % 2], data, position)
            position += count
            data = data[count:]

    def get(self, block: int, batch: int) -> torch.Tensor:
        hidden = torch.empty(self._shapes[batch], dtype=self._dtype)
        view = hidden.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            count = os.preadv(self._files[block % 2], [view[done:]], self._offsets[batch] + done)
            if count == 0:
                raise EOFError(f"state of batch {batch} at block {block} ended early")
            done += count
        return hidden

    def sync(self, block: int) -> None:
        """Force the inputs of ``block`` to disk."""
        os.fdatasync(self._files[block % 2])

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.pop())


def states_present(
    directory: Path, block: int, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype, name: str = "states"
) -> bool:
    """Whether a :class:`DiskStates` of the same arguments has left its file of the inputs of ``block``, whole."""
    path = directory / f"{name}-{_PARITIES[block % 2]}.bin"
    return path.is_file() and path.stat().st_size == sum(lengths) * hidden_size * dtype.itemsize
