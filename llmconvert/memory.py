"""Memory of this process: what it can still get, the peak of a piece of work inside it, and giving freed memory back.

The kernel keeps one high-water mark per process (``VmHWM``). When work raises it, the new mark is that work's exact
peak. When it doesn't, the peak lies below an earlier one and only samples can tell; a thread takes them. The mark is
never reset (``/proc/self/clear_refs``), because that would also falsify what ``time -v`` and ``wait4`` report.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import resource
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import torch

__all__ = [
    "PeakMemory",
    "available_nbytes",
    "keeping_freed_memory",
    "map_large_tensors",
    "release_freed_memory",
    "resident_nbytes",
    "row_slices",
    "rows_at_once",
]

_INTERVAL_SECONDS = 0.05
# Smaller tensors are not worth pages of their own: fresh pages have to be cleared by the kernel, one by one.
_LARGE_NBYTES = 1 << 20
# Where freed memory is taken up again, tensors below this are on the heap, and its top keeps as much as it likes; else
# glibc's own measure.
_REUSED_NBYTES, _KEPT_NBYTES, _TRIMMED_NBYTES = 32 << 20, 512 << 20, 128 << 10
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# oneDNN compiles a product for its shape and keeps 1,024 of them by itself, 0.3 MB each with AVX-512 and AMX: experts,
# which are sent another number of tokens each, would fill that up. A block has some 30 shapes.
_COMPILED_PRODUCTS = 128
# What :func:`keeping_freed_memory` allows now: the heap is the process's, and so is this.
_allowed = 0
_STATUS = Path("/proc/self/status")


class PeakMemory:
    """Context manager; ``nbytes`` and ``method`` hold the result afterwards.

    Attributes:
        nbytes: peak resident set size in bytes while the context was open, what was resident before included.
        method: ``"exact"`` (the kernel's mark rose in this context), ``"sampled"`` (every 50 ms), or ``"process"``
            (no ``/proc`` here: the mark of the whole process so far, an upper bound).
    """

    nbytes: int
    method: str

    def __enter__(self) -> Self:
        self._mark, self._sampled = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        if self._sampled:
            self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        if self._sampled:
            self._thread.join()
        mark, resident = _resident()
        if not resident:
            self.nbytes, self.method = mark, "process"
        elif mark > self._mark:
            self.nbytes, self.method = mark, "exact"
        else:
            self.nbytes, self.method = max(self._sampled, resident), "sampled"

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._sampled = max(self._sampled, _resident()[1])


def _resident() -> tuple[int, int]:
    """High-water mark and current resident size in bytes; the latter is 0 where it can't be known."""
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if line.startswith("Vm"))
        return int(lines["VmHWM"].split()[0]) * 1024, int(lines["VmRSS"].split()[0]) * 1024
    except (OSError, KeyError):
        mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (mark if sys.platform == "darwin" else mark * 1024), 0


def resident_nbytes() -> int:
    """Bytes of this process that are in memory now; 0 where the system doesn't tell."""
    return _resident()[1]


def available_nbytes(device: torch.device) -> int:
    """Bytes this process can still get on a device.

    Of the host, what the kernel calls available, or its control group's limit if lower.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists():
        text = limit.read_text().strip()
        if text != "max":
            available = min(available, int(text) - int(used.read_text()))
    return available


def release_freed_memory(*, everything: bool = False) -> bool:
    """Give memory that was freed inside the heap back to the system, where the C library can (glibc).

    Batches free what they held in another order than they took it, and the holes count as resident until then. What is
    given back comes again as pages that the system has to clear first, which can take a fifth of a job's time: inside
    :func:`keeping_freed_memory`, nothing is given back where the process takes less than was allowed there.

    Args:
        everything: whether it is given back there as well, because what comes next is too large to take it up.

    Returns:
        whether anything was given back.
    """
    if not everything and _allowed and resident_nbytes() < _allowed:
        return False
    library = _glibc()
    return library is not None and bool(library.malloc_trim(0))


def map_large_tensors() -> bool:
    """From here on, give every large tensor of this process pages of its own, which go back when it is freed.

    Activations and temporaries come and go interleaved; on the heap, what stands between the freed ones keeps it from
    shrinking. For smaller ones :func:`release_freed_memory` now and then takes less time. No result changes.

    Returns:
        whether the C library could be told (glibc).
    """
    return _set_heap(_LARGE_NBYTES, _TRIMMED_NBYTES)


@contextmanager
def keeping_freed_memory(allowed: int) -> Iterator[None]:
    """Meanwhile the heap keeps what is freed, of all but very large tensors, for what is taken next.

    Afterwards it is as :func:`map_large_tensors` leaves it.

    Args:
        allowed: bytes of the process above which :func:`release_freed_memory` gives it back; with 0 nothing is kept,
            and large tensors have pages of their own.
    """
    global _allowed
    _limit_compiled_products()
    if not allowed:
        if not _allowed:
            map_large_tensors()
        yield
        return
    before, _allowed = _allowed, allowed
    _set_heap(_REUSED_NBYTES, _KEPT_NBYTES)
    try:
        yield
    finally:
        _allowed = before
        if not before:
            map_large_tensors()
            release_freed_memory()


def _limit_compiled_products() -> None:
    """Let oneDNN keep few compiled products, unless it was told how many; it looks before the process's first one."""
    if "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_COMPILED_PRODUCTS))


def _set_heap(mapped: int, top: int) -> bool:
    library = _glibc()
    if library is None:
        return False
    return bool(library.mallopt(_M_TRIM_THRESHOLD, top)) and bool(library.mallopt(_M_MMAP_THRESHOLD, mapped))


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
        library.malloc_trim.argtypes = [ctypes.c_size_t]
    except (OSError, AttributeError):
        return None
    return library


def rows_at_once(rows: int, width: int, limit: int, *, together: int = 1) -> int:
    """How many of ``rows`` rows of ``width`` numbers to take at a time, so that they hold at most ``limit``.

    At least one is taken, or as many as belong together.

    Args:
        together: rows that are never parted.
    """
    return min(rows, max(1, limit // max(1, width * together)) * together)


def row_slices(shape: Sequence[int], limit: int, *, together: int = 1) -> Iterator[slice]:
    """The rows of a tensor in slices of as many as hold ``limit`` numbers; see :func:`rows_at_once`.

    The last one may have fewer. A tensor without dimensions is one row.
    """
    rows = shape[0] if shape else 1
    step = max(1, rows_at_once(rows, math.prod(shape[1:]), limit, together=together))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
