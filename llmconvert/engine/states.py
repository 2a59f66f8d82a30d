"""Hidden states of every batch at the entry of the next block: in memory, or on disk to resume from."""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from llmconvert.errors import CapacityError, MachineError, UnsupportedError

__all__ = [
    "STATES_IN_MEMORY_NBYTES",
    "DiskStates",
    "MemoryStates",
    "PartOfStates",
    "ScratchStates",
    "States",
    "TapeStates",
    "passing_states",
    "states_present",
]

_PARITIES = ("even", "odd")
#: Beside an evaluation's weights; hidden states beyond that go to a temporary file.
STATES_IN_MEMORY_NBYTES = 256 << 20


class States(Protocol):
    """Block inputs by block and batch. Those of a block may be forgotten once those of the one after are complete."""

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        """Keep the input of ``block`` for ``batch``: as many numbers as ``[1, length, hidden size]``, in any shape."""

    def get(self, block: int, batch: int) -> torch.Tensor:
        """What was put, in the same order; in that shape, or as it was."""


class PartOfStates:
    """Those of some batches that come one after the other, by numbers of their own.

    Args:
        states: of all.
        first: the batch that has number 0 here.
    """

    def __init__(self, states: States, first: int) -> None:
        self._states, self._first = states, first

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        self._states.put(block, self._first + batch, hidden)

    def get(self, block: int, batch: int) -> torch.Tensor:
        return self._states.get(block, self._first + batch)


class MemoryStates:
    """Block inputs in memory; a batch's state goes when its next one comes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], torch.Tensor] = {}

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        self._kept.pop((block - 1, batch), None)
        self._kept[block, batch] = hidden

    def get(self, block: int, batch: int) -> torch.Tensor:
        return self._kept[block, batch]

    def close(self) -> None:
        """Forget them."""
        self._kept.clear()


class _File:
    """The hidden states of all batches at one block; their space is reserved at once. Without a path: unnamed."""

    def __init__(self, path: Path | None, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype) -> None:
        self._shapes = [(1, length, hidden_size) for length in lengths]
        self._dtype = dtype
        row = hidden_size * dtype.itemsize
        self._offsets = [0]
        for length in lengths:
            self._offsets.append(self._offsets[-1] + length * row)
        self._path = path
        try:
            self._fd = _unnamed() if path is None else os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._failed(error, "created") from error
        try:
            os.posix_fallocate(self._fd, 0, self._offsets[-1])
        except OSError as error:
            os.close(self._fd)
            raise self._failed(error, "reserved") from error

    def put(self, batch: int, hidden: torch.Tensor) -> None:
        expected = self._shapes[batch]
        if hidden.dtype != self._dtype:
            found, kept = (str(dtype).removeprefix("torch.") for dtype in (hidden.dtype, self._dtype))
            raise UnsupportedError(
                f"the model's blocks hand on hidden states in {found}, its weights are in {kept}, as is what is kept; "
                f"convert the model first (convert --dtype {found})"
            )
        if hidden.numel() != math.prod(expected):
            raise UnsupportedError(
                f"the model's blocks hand on hidden states of shape {list(hidden.shape)}, expected as many numbers as "
                f"in {list(expected)}; such a model can be quantized by rtn, which needs no text, and not calibrated"
            )
        data = hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        position = self._offsets[batch]
        while data:
            try:
                count = os.pwrite(self._fd, data, position)
            except OSError as error:
                raise self._failed(error, "written") from error
            position += count
            data = data[count:]

    def get(self, batch: int) -> torch.Tensor:
        hidden = torch.empty(self._shapes[batch], dtype=self._dtype)
        view = hidden.reshape(-1).view(torch.uint8).numpy().data
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], self._offsets[batch] + done)
            except OSError as error:
                raise self._failed(error, "read") from error
            if count == 0:
                raise MachineError(f"{self._where}: the activations of batch {batch} end early; another process cut it")
            done += count
        return hidden

    def sync(self) -> None:
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._failed(error, "forced to disk") from error

    @property
    def _where(self) -> str:
        return str(self._path or f"{tempfile.gettempdir()} (set TMPDIR to a directory on a larger disk)")

    def _failed(self, error: OSError, what: str) -> MachineError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return CapacityError(
                f"{self._where}: no space for {self._offsets[-1]:,} bytes of activations: {error.strerror}"
            )
        return MachineError(f"{self._where}: activations cannot be {what}: {error.strerror}")

    def close(self) -> None:
        os.close(self._fd)


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
        self._files: list[_File] = []
        try:
            for parity in _PARITIES:
                self._files.append(_File(directory / f"{name}-{parity}.bin", lengths, hidden_size, dtype))
        except MachineError:
            self.close()
            raise

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        self._files[block % 2].put(batch, hidden)

    def get(self, block: int, batch: int) -> torch.Tensor:
        return self._files[block % 2].get(batch)

    def sync(self, block: int) -> None:
        """Force the inputs of ``block`` to disk."""
        self._files[block % 2].sync()

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.pop().close()


class ScratchStates:
    """Block inputs in a temporary file without a name, in which a batch's next state takes the place of its last.

    It lies where ``TMPDIR`` says, and nothing of it outlasts the process.

    Args:
        lengths, hidden_size, dtype: as for :class:`DiskStates`; space for all is reserved when the first one comes,
            which raises ``CapacityError`` if there is none.
    """

    def __init__(self, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype) -> None:
        self._about = (lengths, hidden_size, dtype)
        self._file: _File | None = None

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        if self._file is None:
            self._file = _File(None, *self._about)
        self._file.put(batch, hidden)

    def get(self, block: int, batch: int) -> torch.Tensor:
        assert self._file is not None
        return self._file.get(batch)

    def close(self) -> None:
        """Give the space back."""
        file, self._file = self._file, None
        if file is not None:
            file.close()


class TapeStates:
    """Block inputs of all blocks, in a file each: for going back through the model.

    Args:
        directory: where the files go; a file's space is reserved when its first state comes.
        lengths, hidden_size, dtype: as for :class:`DiskStates`.
    """

    def __init__(self, directory: Path, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype) -> None:
        self._directory = directory
        self._about = (lengths, hidden_size, dtype)
        self._files: dict[int, _File] = {}

    def put(self, block: int, batch: int, hidden: torch.Tensor) -> None:
        self._file(block).put(batch, hidden)

    def get(self, block: int, batch: int) -> torch.Tensor:
        return self._file(block).get(batch)

    def sync(self, block: int) -> None:
        """Force the inputs of ``block`` to disk."""
        self._file(block).sync()

    def present(self, block: int) -> bool:
        """Whether the file of ``block`` is there, whole."""
        lengths, hidden_size, dtype = self._about
        path = self._path(block)
        return path.is_file() and path.stat().st_size == sum(lengths) * hidden_size * dtype.itemsize

    def close(self) -> None:
        """Close the files."""
        while self._files:
            self._files.popitem()[1].close()

    def _file(self, block: int) -> _File:
        if block not in self._files:
            self._files[block] = _File(self._path(block), *self._about)
        return self._files[block]

    def _path(self, block: int) -> Path:
        return self._directory / f"tape-{block}.bin"


def passing_states(
    lengths: Sequence[int], hidden_size: int, dtype: torch.dtype, models: int = 1
) -> MemoryStates | ScratchStates:
    """For a pass that nobody resumes: in memory, or in a temporary file where they would take more than 256 MiB.

    Args:
        lengths, hidden_size, dtype: as for :class:`DiskStates`.
        models: that have states of this kind at once. Two have 256 MiB each; more share what two have.
    """
    if sum(lengths) * hidden_size * dtype.itemsize * max(1.0, models / 2) <= STATES_IN_MEMORY_NBYTES:
        return MemoryStates()
    return ScratchStates(lengths, hidden_size, dtype)


def states_present(
    directory: Path, block: int, lengths: Sequence[int], hidden_size: int, dtype: torch.dtype, name: str = "states"
) -> bool:
    """Whether a :class:`DiskStates` of the same arguments has left its file of the inputs of ``block``, whole."""
    path = directory / f"{name}-{_PARITIES[block % 2]}.bin"
    return path.is_file() and path.stat().st_size == sum(lengths) * hidden_size * dtype.itemsize


def _unnamed() -> int:
    """A descriptor of an empty temporary file that nothing else refers to."""
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
