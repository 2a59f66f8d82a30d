"""Reading the header of a GGUF file: metadata, and where each tensor lies.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, tensor count, metadata count,
key-value pairs, tensor infos, padding to ``general.alignment``, tensor data. Every count and length in a file is
checked against the bytes that are left before memory is asked for, so a corrupt file ends in an error, not in swap.

The reader of the ``gguf`` package maps the whole file into memory; this one reads the header and nothing else.
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from llmconvert.errors import ChangedError, CheckpointError, UnsupportedError

__all__ = ["GgufHeader", "GgufTensor", "Metadata", "parse_gguf_header", "read_gguf_header", "shown"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_DEFAULT_ALIGNMENT: Final = 32
_MAX_DIMENSIONS: Final = 4
# Metadata value types: numpy dtype of the fixed-size ones, by their number in the file.
_SCALARS: Final = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
# The least a metadata pair and a tensor info can take: lengths, type, and one byte or one dimension.
_MIN_PAIR_BYTES: Final = 8 + 4 + 1
_MIN_TENSOR_BYTES: Final = 8 + 4 + 8 + 4 + 8
# Values are little enough in a model file; this only stops a string length that is garbage. Names are short.
_MAX_STRING_BYTES: Final = 1 << 30
_MAX_NAME_BYTES: Final = 1 << 10
_LONGEST_SHOWN: Final = 80


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        name: its GGUF name, for example ``blk.0.attn_q.weight``.
        qtype: how its values are stored.
        shape: slowest dimension first, as torch counts them (the file has them the other way round).
        offset: of its first byte, from the start of the file.
        nbytes: stored size in bytes.
        part: which of the model's files it lies in.
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


def shown(value: object) -> str:
    """A value from a file, as a message shows it: in one line, and not all of a long one."""
    if isinstance(value, np.ndarray):
        value = value[:_LONGEST_SHOWN].tolist()
    text = repr(value[:_LONGEST_SHOWN] if isinstance(value, (str, list)) else value)
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


class Metadata(Mapping[str, Any]):
    """The metadata of one file, with lookups that name the file and key when something is wrong."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path = path
        self._values = MappingProxyType(dict(values))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def integer(self, key: str, default: int | None = None) -> int:
        """The integer under ``key``; one value per layer is accepted when all are the same.

        Raises:
            CheckpointError: absent without a default, or no integer.
            UnsupportedError: it differs between layers.
        """
        value = self._values.get(key, default)
        if isinstance(value, np.ndarray) and value.size and np.issubdtype(value.dtype, np.integer):
            if (value != value[0]).any():
                raise UnsupportedError(f"{self.path}: {key} differs between layers: {shown(value)}; not supported")
            value = int(value[0])
        if value is None:
            raise CheckpointError(f"{self.path}: metadata has no {key}; the file is incomplete")
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.path}: metadata {key} should be an integer, found {shown(value)}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The number under ``key``.

        Raises:
            CheckpointError: absent without a default, or no finite number.
        """
        value = self._values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata has no {key}; the file is incomplete")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self.path}: metadata {key} should be a finite number, found {shown(value)}")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """The string under ``key``.

        Raises:
            CheckpointError: absent without a default, or no string.
        """
        value = self._values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: metadata has no {key}; the file is incomplete")
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: metadata {key} should be a string, found {shown(value)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """The boolean under ``key``.

        Raises:
            CheckpointError: no boolean.
        """
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: metadata {key} should be true or false, found {shown(value)}")
        return value

    def strings(self, key: str) -> list[str]:
        """The array of strings under ``key``.

        Raises:
            CheckpointError: absent, or no array of strings.
        """
        value = self._values.get(key)
        if not isinstance(value, list):
            raise CheckpointError(f"{self.path}: metadata has no array of strings {key}; the file is incomplete")
        return value

    def numbers(self, key: str, count: int) -> np.ndarray | None:
        """The numeric array under ``key``, or None when absent.

        Raises:
            CheckpointError: no numeric array, or not of ``count`` elements.
        """
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or value.size != count:
            found = f"{value.size:,} of them" if isinstance(value, np.ndarray) else shown(value)
            raise CheckpointError(f"{self.path}: metadata {key} should be {count:,} numbers, found {found}")
        return value


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says about itself: its metadata and its tensors, in file order, by GGUF name.

    ``parts`` are the files of the model: the one at ``path``, or those of a split model.
    """

    path: Path
    metadata: Metadata
    tensors: Mapping[str, GgufTensor]
    parts: tuple[Path, ...]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file (version 2 or 3, little-endian).

    Raises:
        CheckpointError: no GGUF file, truncated, or a header that contradicts itself or the file's size.
        UnsupportedError: another version or byte order.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is no regular file")
    try:
        with path.open("rb") as file:
            return _parse(path, _Cursor(path, file, os.fstat(file.fileno()).st_size))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_gguf_header(path: Path, raw: bytes, size: int) -> GgufHeader:
    """The header of a file that does not exist yet: what :func:`read_gguf_header` would find at ``path``.

    Args:
        path: named in errors.
        raw: the header's bytes.
        size: of the whole file.
    """
    return _parse(path, _Cursor(path, io.BytesIO(raw), size))


class _Cursor:
    """Reads forward through a file, and says what was being read when the file ends too soon."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file

    @property
    def left(self) -> int:
        return self.size - self.position

    def take(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise CheckpointError(
                f"{self.path}: {what} claims {count:,} bytes at byte {self.position:,}, the file has {self.size:,}; "
                "it is truncated or corrupt, download it again"
            )
        data = self._file.read(count)
        if len(data) != count:
            raise ChangedError(f"{self.path}: the file ended inside {what}; it changed while being read")
        self.position += count
        return data

    def count(self, each: int, what: str) -> int:
        """A 64-bit count of things that take at least ``each`` bytes."""
        (value,) = struct.unpack("<Q", self.take(8, what))
        if value * each > self.left:
            raise CheckpointError(
                f"{self.path}: {what} is {value:,}, which cannot fit in the {self.left:,} bytes that follow; "
                "the file is truncated or corrupt, download it again"
            )
        return int(value)

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def name(self, what: str) -> str:
        """A short string in which nothing is hidden."""
        found = self.string(what, _MAX_NAME_BYTES)
        if not found.isprintable():
            raise CheckpointError(f"{self.path}: {what}, {shown(found)}, is no name; the file is corrupt")
        return found

    def string(self, what: str, longest: int = _MAX_STRING_BYTES) -> str:
        length = self.count(1, f"the length of {what}")
        if length > longest:
            raise CheckpointError(f"{self.path}: {what} is {length:,} bytes long; the file is corrupt")
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 ({error.reason}); the file is corrupt") from None


def _parse(path: Path, cursor: _Cursor) -> GgufHeader:
    if (magic := cursor.take(4, "the magic number")) != _MAGIC:
        raise CheckpointError(f"{path}: starts with {magic!r}, expected {_MAGIC!r}; not a GGUF file")
    version = cursor.u32("the version")
    if version not in _VERSIONS:
        if version & 0xFFFF == 0:
            raise UnsupportedError(f"{path}: is a big-endian GGUF file; use its little-endian edition")
        raise UnsupportedError(f"{path}: is GGUF version {version}; supported are {_VERSIONS[0]} and {_VERSIONS[1]}")
    tensor_count = cursor.count(_MIN_TENSOR_BYTES, "the number of tensors")
    pair_count = cursor.count(_MIN_PAIR_BYTES, "the number of metadata pairs")
    values: dict[str, Any] = {}
    for index in range(pair_count):
        key = cursor.name(f"metadata key {index}")
        if key in values:
            raise CheckpointError(f"{path}: metadata {key} appears twice; the file is corrupt")
        values[key] = _value(cursor, cursor.u32(f"the type of {key}"), key)
    metadata = Metadata(path, values)
    return GgufHeader(path, metadata, _tensors(path, cursor, tensor_count, metadata), (path,))


def _value(cursor: _Cursor, kind: int, key: str) -> Any:
    """One metadata value: int, float, bool, str, list of str, or a numeric numpy array."""
    what = f"metadata {key}"
    if kind in _SCALARS:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(cursor.take(dtype.itemsize, what), dtype)[0].item()
    if kind == _BOOL:
        return cursor.take(1, what) != b"\0"
    if kind == _STRING:
        return cursor.string(what)
    if kind != _ARRAY:
        raise CheckpointError(f"{cursor.path}: {what} has value type {kind}, known are 0 to 12; the file is corrupt")
    item = cursor.u32(f"the element type of {what}")
    if item == _STRING:
        return [cursor.string(what) for _ in range(cursor.count(8, f"the length of {what}"))]
    if item not in _SCALARS and item != _BOOL:
        raise CheckpointError(f"{cursor.path}: {what} is an array of value type {item}; expected numbers or strings")
    dtype = np.dtype(_SCALARS.get(item, "?"))
    count = cursor.count(dtype.itemsize, f"the length of {what}")
    return np.frombuffer(cursor.take(count * dtype.itemsize, what), dtype)


def _tensors(path: Path, cursor: _Cursor, count: int, metadata: Metadata) -> Mapping[str, GgufTensor]:
    alignment = metadata.integer("general.alignment", _DEFAULT_ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment}, expected a power of two")
    relative = [_tensor_info(path, cursor, index) for index in range(count)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    expected = 0
    for tensor in relative:
        if tensor.name in tensors:
            raise CheckpointError(f"{path}: tensor {tensor.name!r} appears twice; the file is corrupt")
        if tensor.offset != expected:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} starts at byte {tensor.offset:,} of the data, expected {expected:,}; "
                "the header is corrupt"
            )
        end = start + tensor.offset + tensor.nbytes
        if end > cursor.size:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} ends at byte {end:,}, the file has {cursor.size:,}; "
                "the download was cut off, fetch it again"
            )
        tensors[tensor.name] = GgufTensor(tensor.name, tensor.qtype, tensor.shape, start + tensor.offset, tensor.nbytes)
        expected = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
    return MappingProxyType(tensors)


def _tensor_info(path: Path, cursor: _Cursor, index: int) -> GgufTensor:
    """One entry of the tensor table; its offset still counts from the start of the data."""
    name = cursor.name(f"the name of tensor {index}")
    what = f"the entry of tensor {name!r}"
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise CheckpointError(f"{path}: tensor {name!r} has {dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}")
    shape = tuple(cursor.u64(what) for _ in range(dimensions))[::-1]
    number = cursor.u32(what)
    offset = cursor.u64(what)
    try:
        qtype = GGMLQuantizationType(number)
    except ValueError:
        raise CheckpointError(
            f"{path}: tensor {name!r} has type number {number}, which is unknown; the file is corrupt, or newer than "
            "the installed gguf package"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    if 0 in shape or shape[-1] % block:
        raise CheckpointError(
            f"{path}: tensor {name!r} has shape {list(shape)}, impossible for {qtype.name} with blocks of {block}; "
            "the header is corrupt"
        )
    return GgufTensor(name, qtype, shape, offset, math.prod(shape) // block * block_bytes)
