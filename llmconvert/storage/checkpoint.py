"""Checkpoints as lazy, read-only mappings from tensor names to tensors.

A checkpoint is opened from headers alone; a tensor's bytes are read when it is asked for, whole or in rows.
Reading uses ``preadv`` into ordinary memory, never ``mmap``: mapped pages count as resident memory, and a tensor
in a mapped page can round differently in a matrix product than one in fresh memory.

The on-disk format is safetensors: eight bytes of little-endian header length, a JSON header, the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
import os
import struct
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch

from llmconvert.errors import ChangedError, CheckpointError
from llmconvert.storage.directory import identity_of, index_name, other_files, read_config, read_index, shard_names
from llmconvert.storage.parsing import parse_json

__all__ = [
    "DTYPE_NAMES",
    "Checkpoint",
    "CheckpointView",
    "SafetensorsCheckpoint",
    "TensorInfo",
    "TensorSpec",
    "read_header",
]


#: torch dtype of every safetensors dtype name that torch can hold.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

# The reference implementation refuses larger headers; a corrupt length is caught before memory is asked for.
_MAX_HEADER_BYTES = 100_000_000
# Linux moves at most 0x7ffff000 bytes per call; smaller reads also let a signal through now and then.
_READ_CHUNK = 1 << 28


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor will look like on disk: name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorInfo(TensorSpec):
    """A tensor of a checkpoint: its spec, and the file it lies in."""

    shard: str


class Checkpoint(Mapping[str, torch.Tensor]):
    """A lazy, read-only mapping name → tensor, with the model's config and its other files.

    Subclasses give ``infos``, ``config``, ``files`` and ``read_rows``; everything else follows from these.
    A transforming step (a cast, a head merge, a dequantizer) is a :class:`CheckpointView` over another checkpoint.
    """

    #: Tensor name → :class:`TensorInfo`, in on-disk order; known without reading any tensor.
    infos: Mapping[str, TensorInfo]
    #: The parsed ``config.json``. Treat as read-only.
    config: Mapping[str, Any]
    #: File name → content source of every non-weight file besides ``config.json`` that belongs to the model:
    #: a path to copy, or the bytes themselves.
    files: Mapping[str, Path | bytes]
    #: Weight name → what the inputs of its linear are quantized to while the model runs; most checkpoints have none.
    quantized_inputs: Mapping[str, Any] = MappingProxyType({})
    #: Attention module → what its keys and values are divided by in a quantized cache; most checkpoints have none.
    quantized_cache: Mapping[str, Any] = MappingProxyType({})
    #: Tells checkpoints apart whose tensors and config look alike, as far as files tell without being read; may be "".
    identity: str = ""
    #: Why no tokenizer is among the files although the model has one; "" where that is not so.
    without_tokenizer: str = ""

    @abstractmethod
    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start:stop`` along the first dimension of ``name``, in fresh CPU memory that the caller owns.

        A zero-dimensional tensor counts as a single row and comes back zero-dimensional.

        Raises:
            KeyError: no such tensor.
            CheckpointError: the file ended early or could not be read.
        """

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.infos[name].shape
        return self.read_rows(name, 0, shape[0] if shape else 1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos

    @property
    def nbytes(self) -> int:
        """Total size of all tensors in bytes."""
        return sum(info.nbytes for info in self.infos.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes that the tensors take where they are stored; as they are read, by default."""
        return self.nbytes

    def read_file(self, name: str) -> bytes:
        """The bytes of a non-weight file in :attr:`files`."""
        content = self.files[name]
        return content if isinstance(content, bytes) else content.read_bytes()

    def prefetch(self, names: Iterable[str]) -> None:
        """Let the system read these tensors ahead where it can; returns at once, takes no memory of the process."""

    def close(self) -> None:
        """Release file descriptors. Reading afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class CheckpointView(Checkpoint):
    """A checkpoint seen through a transformation; as it stands, the identity. Override what changes."""

    def __init__(self, base: Checkpoint) -> None:
        self.base = base
        self.infos = base.infos
        self.config = base.config
        self.files = base.files
        self.quantized_inputs = base.quantized_inputs
        self.quantized_cache = base.quantized_cache
        self.identity = base.identity
        self.without_tokenizer = base.without_tokenizer

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.base.read_rows(name, start, stop)

    def prefetch(self, names: Iterable[str]) -> None:
        self.base.prefetch(name for name in names if name in self.base)

    def close(self) -> None:
        self.base.close()


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a tensor lies: shard file name and byte offset from the start of the file."""

    shard: str
    offset: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        The tensors, the offset of each from the start of the file in bytes, and the file's metadata.

    Raises:
        CheckpointError: not a safetensors file, truncated, or a header that contradicts itself or the file's size.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file; download it again")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: header claims {length:,} bytes, the file has {size:,}; "
                    "it is truncated or not a safetensors file; download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        header = parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: header is not JSON ({error}); the file is corrupt") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: header is a JSON {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {}) or {}
    data_start = 8 + length
    infos: dict[str, TensorInfo] = {}
    offsets: dict[str, int] = {}
    end_of_previous = 0
    try:
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, entry in entries:
            begin, end = entry["data_offsets"]
            if not all(type(number) is int and number >= 0 for number in (*entry["shape"], begin, end)):
                raise ValueError(f"{name!r}: shape and offsets must be whole numbers, none negative")
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES)}"
                )
            info = TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), path.name)
            if end - begin != info.nbytes or begin != end_of_previous:
                raise CheckpointError(
                    f"{path}: tensor {name!r} ({entry['dtype']} {list(info.shape)}, {info.nbytes:,} bytes) claims "
                    f"bytes {begin:,}–{end:,}, expected to start at {end_of_previous:,}; the header is corrupt"
                )
            infos[name] = info
            offsets[name] = data_start + begin
            end_of_previous = end
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: header entry is malformed ({error!r}); the file is corrupt") from error
    if data_start + end_of_previous != size:
        raise CheckpointError(
            f"{path}: the header describes {data_start + end_of_previous:,} bytes, the file has {size:,}; "
            "the download was cut off or the file is corrupt"
        )
    return infos, offsets, metadata


class SafetensorsCheckpoint(Checkpoint):
    """A directory in Hugging Face layout: ``config.json``, safetensors shards with or without index, other files.

    Args:
        directory: the model directory.

    Raises:
        CheckpointError: no ``config.json`` or weights, a shard named by the index is missing or leaves the
            directory, or any header is corrupt.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self._extents: dict[str, _Extent] = {}
        self._fds: dict[str, int] = {}
        infos: dict[str, TensorInfo] = {}
        shards = shard_names(self.directory)
        for shard in shards:
            shard_infos, offsets, _ = read_header(self.directory / shard)
            for name, info in shard_infos.items():
                if name in infos:
                    raise CheckpointError(f"{self.directory}: tensor {name!r} is in {infos[name].shard} and in {shard}")
                infos[name] = info
                self._extents[name] = _Extent(shard, offsets[name])
            self._fds[shard] = _open_readonly(self.directory / shard)
        self.infos = infos
        self.files = other_files(self.directory)
        self.identity = identity_of(self.directory / shard for shard in shards)
        _check_index(self.directory, infos)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        info = self.infos[name]
        shape = (max(0, stop - start), *info.shape[1:]) if info.shape else ()
        out = torch.empty(shape, dtype=info.dtype)
        self.read_into(name, start, out)
        return out

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill contiguous CPU tensor ``out`` with consecutive rows of ``name`` from row ``start`` on."""
        if out.numel() == 0:
            return
        info = self.infos[name]
        first = start * math.prod(info.shape[1:]) * info.dtype.itemsize
        self.read_bytes(name, first, out.reshape(-1).view(torch.uint8).numpy().data)

    def read_bytes(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``offset`` of tensor ``name`` on: any part of a tensor, however large its rows."""
        self.pread(self._extents[name].shard, self._extents[name].offset + offset, buffer, what=name)

    def pread(self, shard: str, offset: int, buffer: memoryview, *, what: str) -> None:
        """Fill ``buffer`` from byte ``offset`` of ``shard``; ``what`` names the content in errors."""
        fd = self._fds[shard]
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(fd, [buffer[done : done + _READ_CHUNK]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.directory / shard}: reading {what}: {error.strerror}") from error
            if count == 0:
                raise ChangedError(f"{self.directory / shard}: the file ended inside {what}; it changed on disk")
            done += count

    def drop_cache(self, name: str, offset: int = 0, nbytes: int | None = None) -> None:
        """Tell the kernel that these bytes of ``name`` are not needed again, so a large file doesn't evict others."""
        nbytes = self.infos[name].nbytes - offset if nbytes is None else nbytes
        self._advise(name, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def prefetch(self, names: Iterable[str]) -> None:
        for name in names:
            self._advise(name, 0, self.infos[name].nbytes, os.POSIX_FADV_WILLNEED)

    def _advise(self, name: str, offset: int, nbytes: int, advice: int) -> None:
        if nbytes > 0:  # zero would mean the rest of the file
            extent = self._extents[name]
            os.posix_fadvise(self._fds[extent.shard], extent.offset + offset, nbytes, advice)

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_fds"):
            self.close()


def _open_readonly(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error


def _check_index(directory: Path, infos: Mapping[str, TensorInfo]) -> None:
    index = index_name(directory)
    for name, shard in (read_index(directory, index) or {}).items():
        # Entries of tensors that are nowhere, a head that is tied, for example, are left behind by some writers.
        if name in infos and infos[name].shard != shard:
            raise CheckpointError(f"{directory / index}: places {name!r} in {shard}, which does not hold it")
