"""Laying out a GGUF file to be written: its header's bytes, and where each tensor's data goes.

The counterpart of :mod:`~llmconvert.gguf.header`, as a :class:`~llmconvert.storage.writer.Layout`: space is reserved,
and tensors are written in place, in any order, by the same :class:`~llmconvert.storage.writer.TensorWriter` as those
of safetensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.storage.writer import Layout, Shard

__all__ = ["GgufSpec", "plan_gguf", "plan_parts"]

_ALIGNMENT: Final = 32
_VERSION: Final = 3
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ARRAY_TYPES: Final = {
    np.dtype(np.uint8): 0,
    np.dtype(np.int32): 5,
    np.dtype(np.float32): _FLOAT32,
    np.dtype(np.bool_): _BOOL,
}
# Where llama.cpp wants another kind of integer than uint32.
_SIZED: Final = {np.uint16: 2, np.int32: 5}


@dataclass(frozen=True, slots=True)
class GgufSpec:
    """A tensor to be written: its name in the file, its type, and its shape, slowest dimension first."""

    name: str
    qtype: str
    shape: tuple[int, ...]

    @property
    def row_nbytes(self) -> int:
        """Bytes of one row; of a vector, which is a single row, all of it."""
        codec = load_codec(self.qtype)
        return self.shape[-1] // codec.size * codec.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return self.rows * self.row_nbytes

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return math.prod(self.shape[:-1])


def plan_gguf(file_name: str, metadata: Mapping[str, Any], specs: Sequence[GgufSpec]) -> Layout:
    """The layout of one GGUF file; its tensors are uint8 ``[rows, row bytes]``.

    Args:
        file_name: of the file in the writer's directory.
        metadata: str, bool, int, float, numpy's uint16 and int32, list of str, or arrays of int32, float32, uint8 and
            bool, by key.
        specs: tensors in the order they get in the file.

    Raises:
        UnsupportedError: an integer that 32 bits without a sign do not hold, or a number that float32 does not reach.
    """
    shard = _plan_part(file_name, metadata, specs)
    return Layout((shard,), _specs(specs), {spec.name: shard for spec in specs}, None)


def plan_parts(
    names: Callable[[int], Sequence[str]], metadata: Mapping[str, Any], specs: Sequence[GgufSpec], most: int
) -> Layout:
    """The layout of a model in several files, as ``llama-gguf-split`` makes them; of one, if all fits into it.

    Args:
        names: the files' names, by how many there are.
        metadata: see :func:`plan_gguf`; it lies in the first file, beside tensors of its own.
        specs: tensors in their order through all files.
        most: bytes of tensors in a file; one that is larger has a file to itself.

    Raises:
        UnsupportedError: see :func:`plan_gguf`.
    """
    parts: list[list[GgufSpec]] = [[]]
    filled = 0
    for spec in specs:
        if parts[-1] and filled + spec.nbytes > most:
            parts.append([])
            filled = 0
        parts[-1].append(spec)
        filled += _aligned(spec.nbytes)
    if len(parts) == 1:
        return plan_gguf(names(1)[0], metadata, specs)
    shards: list[Shard] = []
    for number, (name, part) in enumerate(zip(names(len(parts)), parts, strict=True)):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(len(parts)),
            "split.tensors.count": np.int32(len(specs)),
        }
        shards.append(_plan_part(name, split if number else {**metadata, **split}, part))
    placed = {spec.name: shard for shard, part in zip(shards, parts, strict=True) for spec in part}
    return Layout(tuple(shards), _specs(specs), placed, None)


def _specs(specs: Sequence[GgufSpec]) -> dict[str, TensorSpec]:
    return {spec.name: TensorSpec(spec.name, torch.uint8, (spec.rows, spec.row_nbytes)) for spec in specs}


def _plan_part(file_name: str, metadata: Mapping[str, Any], specs: Sequence[GgufSpec]) -> Shard:
    entries = []
    position = 0
    begins: dict[str, int] = {}
    for spec in specs:
        begins[spec.name] = position
        dimensions = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
        kind = int(GGMLQuantizationType[spec.qtype])
        entries.append(_string(spec.name) + dimensions + struct.pack("<IQ", kind, position))
        position = _aligned(position + spec.nbytes)
    counts = struct.pack("<IQQ", _VERSION, len(specs), len(metadata))
    pairs = [_string(key) + _value(key, value) for key, value in metadata.items()]
    header = b"".join([b"GGUF", counts, *pairs, *entries])
    header += bytes(_aligned(len(header)) - len(header))
    offsets = {name: len(header) + begin for name, begin in begins.items()}
    return Shard(file_name, header, offsets, len(header) + position)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, (np.uint16, np.int32)):
        return struct.pack("<I", _SIZED[type(value)]) + value.tobytes()
    if isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise UnsupportedError(f"metadata {key} is {value}, which a GGUF file's 32 bits do not hold")
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        if abs(value) > float(np.finfo(np.float32).max) or (value and not np.float32(value)):
            raise UnsupportedError(
                f"metadata {key} is {value:g}, which is out of float32's range; a GGUF file has that"
            )
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", _ARRAY, _ARRAY_TYPES[value.dtype], value.size) + value.tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
