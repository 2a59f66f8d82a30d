"""Moving a checkpoint's tensors to a writer in constant memory: read, cast and write at the same time.

Tensors are cut into blocks, whatever their size. One thread reads ahead, a few cast, one writes; blocks travel in a
handful of buffers that are used again and again, and page cache is given back behind the reader and the writer.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from llmconvert.convert.cast import CastErrors, cast_into
from llmconvert.progress import Task
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorInfo, TensorSpec
from llmconvert.storage.writer import TensorWriter

__all__ = ["BUFFER_NBYTES", "buffer_nbytes", "stream_tensors"]

#: What its buffers take, at most.
BUFFER_NBYTES = 100_000_000

# Elements per block: large enough for sequential disk speed, small enough that all buffers stay below 100 MB.
_BLOCK = 1 << 20
_WIDEST = 8
# How far behind the writer its pages are given back; nearer ones are still on their way to the disk.
_LAG_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Block:
    """Elements ``start:stop`` of a tensor, counted over the flattened tensor; whether they are its last."""

    name: str
    start: int
    stop: int
    last: bool


@dataclass(frozen=True, slots=True)
class _Slot:
    """The two buffers a block travels in, uint8."""

    source: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Done:
    block: _Block
    slot: _Slot
    errors: CastErrors


def _casters() -> int:
    return min(4, os.cpu_count() or 1)


def _slots() -> int:
    return _casters() + 3


def buffer_nbytes(source: Checkpoint, specs: Iterable[TensorSpec]) -> int:
    """What the buffers take for tensors of ``source`` that become ``specs``.

    Pages that no block reaches are never in memory, so narrow dtypes take less than there is room for. What is not read
    from a file as it is comes in whole rows of its own, and is counted by the bound.
    """
    if not isinstance(source, SafetensorsCheckpoint):
        return BUFFER_NBYTES
    read = max((info.dtype.itemsize for info in source.infos.values()), default=0)
    cast = [spec.dtype.itemsize for spec in specs if spec.dtype != source.infos[spec.name].dtype]
    return min(BUFFER_NBYTES, _slots() * _BLOCK * (read + max(cast, default=0)))


def stream_tensors(
    source: Checkpoint, names: Iterable[str], writer: TensorWriter, task: Task
) -> Generator[tuple[str, CastErrors, bool], None, None]:
    """Write tensors of ``source``, in the order of ``names``, in the dtype that the writer's layout gives them.

    Tensors whose dtype stays are written as they are, bit for bit. ``task`` advances by bytes read. Close the generator
    before the writer when leaving early; that ends its threads.

    Yields:
        The tensor's name, what casting it cost, and whether that was its last: block after block, once each is written.

    Raises:
        CheckpointError: the source cannot be read.
        CapacityError: the disk is full.
    """
    casters = _casters()
    free = [_Slot(*(torch.empty(_BLOCK * _WIDEST, dtype=torch.uint8) for _ in range(2))) for _ in range(_slots())]
    pending: deque[Future[_Done]] = deque()
    behind = _Behind(writer)

    def finish() -> tuple[str, CastErrors, bool]:
        done = pending.popleft().result()
        free.append(done.slot)
        task.advance((done.block.stop - done.block.start) * source.infos[done.block.name].dtype.itemsize)
        return done.block.name, done.errors, done.block.last

    # Left in reverse: the readers stop first, and whatever failed or interrupted this is raised when all are idle.
    with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(casters) as casting, ThreadPoolExecutor(1) as reading:
        try:
            for block in _blocks(source, names):
                if not free:
                    yield finish()
                slot = free.pop()
                read = reading.submit(_read, source, block, slot)
                cast = casting.submit(_cast, read, writer.layout.specs[block.name].dtype, slot)
                pending.append(writing.submit(_write, cast, writer, behind, block, slot))
            while pending:
                yield finish()
        finally:
            for pool in (reading, casting, writing):
                pool.shutdown(wait=False, cancel_futures=True)


def _blocks(source: Checkpoint, names: Iterable[str]) -> Iterator[_Block]:
    for name in names:
        info = source.infos[name]
        count = math.prod(info.shape)
        step = _BLOCK if isinstance(source, SafetensorsCheckpoint) else _whole_rows(info)
        for start in range(0, count, step):
            yield _Block(name, start, min(start + step, count), start + step >= count)


def _whole_rows(info: TensorInfo) -> int:
    """Elements per block where only whole rows can be read."""
    row = math.prod(info.shape[1:])
    return max(1, _BLOCK // row) * row if row else 1


def _read(source: Checkpoint, block: _Block, slot: _Slot) -> torch.Tensor:
    """The block's elements, ``[n]``: in the slot's buffer if the source can fill one."""
    info = source.infos[block.name]
    if not isinstance(source, SafetensorsCheckpoint):
        row = math.prod(info.shape[1:])
        return source.read_rows(block.name, block.start // row, block.stop // row).contiguous().view(-1)
    size = info.dtype.itemsize
    offset, nbytes = block.start * size, (block.stop - block.start) * size
    buffer = slot.source[:nbytes]
    source.read_bytes(block.name, offset, buffer.numpy().data)
    source.drop_cache(block.name, offset, nbytes)
    return buffer.view(info.dtype)


def _cast(read: Future[torch.Tensor], dtype: torch.dtype, slot: _Slot) -> tuple[torch.Tensor, CastErrors]:
    values = read.result()
    if values.dtype == dtype:
        return values, CastErrors()
    nbytes = values.numel() * dtype.itemsize
    # A single row of a transforming view can be larger than a slot.
    out = slot.target[:nbytes].view(dtype) if nbytes <= slot.target.numel() else torch.empty(len(values), dtype=dtype)
    return out, cast_into(values, out)


def _write(
    cast: Future[tuple[torch.Tensor, CastErrors]], writer: TensorWriter, behind: _Behind, block: _Block, slot: _Slot
) -> _Done:
    values, errors = cast.result()
    data = values.view(torch.uint8).numpy().data
    offset = block.start * values.dtype.itemsize
    writer.write_bytes(block.name, offset, data)
    behind.wrote(block.name, offset, len(data))
    return _Done(block, slot, errors)


class _Behind:
    """Starts the write-back of each block at once, and gives its pages back some time later."""

    def __init__(self, writer: TensorWriter) -> None:
        self._writer = writer
        self._recent: deque[tuple[str, int, int]] = deque()
        self._bytes = 0

    def wrote(self, name: str, offset: int, nbytes: int) -> None:
        self._writer.drop_cache(name, offset, nbytes)
        self._recent.append((name, offset, nbytes))
        self._bytes += nbytes
        while self._bytes > _LAG_BYTES:
            oldest = self._recent.popleft()
            self._writer.drop_cache(*oldest)
            self._bytes -= oldest[2]
