"""Laying out a GGUF file to be written: its header's bytes, and where each tensor's data goes.

The counterpart of :mod:`~llmconvert.gguf.header`, as a :class:`~llmconvert.storage.writer.Layout`: space is reserved,
and tensors are written in place, in any order, by the same :class:`~llmconvert.storage.writer.TensorWriter` as those
of safetensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.storage.writer import Layout, Shard

__all__ = ["GgufSpec", "plan_gguf"]

_ALIGNMENT: Final = 32
_VERSION: Final = 3
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ARRAY_TYPES: Final = {np.dtype(np.int32): 5, np.dtype(np.float32): _FLOAT32}


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
    def rows(self) -> int:
        """How many rows it has."""
        return math.prod(self.shape[:-1])


def plan_gguf(file_name: str, metadata: Mapping[str, Any], specs: Sequence[GgufSpec]) -> Layout:
    """The layout of one GGUF file; its tensors are uint8 ``[rows, row bytes]``.

    Args:
        file_name: of the file in the writer's directory.
        metadata: str, bool, int, float, list of str, or int32 and float32 arrays, by key.
        specs: tensors in the order they get in the file.

    Raises:
        UnsupportedError: an integer that 32 bits without a sign do not hold, or a number that float32 does not reach.
    """
    entries = []
    position = 0
    begins: dict[str, int] = {}
    for spec in specs:
        begins[spec.name] = position
        dimensions = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *reversed(spec.shape))
        kind = int(GGMLQuantizationType[spec.qtype])
        entries.append(_string(spec.name) + dimensions + struct.pack("<IQ", kind, position))
        position = _aligned(position + spec.rows * spec.row_nbytes)
    counts = struct.pack("<IQQ", _VERSION, len(specs), len(metadata))
    pairs = [_string(key) + _value(key, value) for key, value in metadata.items()]
    header = b"".join([b"GGUF", counts, *pairs, *entries])
    header += bytes(_aligned(len(header)) - len(header))
    shard = Shard(
        file_name, header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + position
    )
    tensors = {spec.name: TensorSpec(spec.name, torch.uint8, (spec.rows, spec.row_nbytes)) for spec in specs}
    return Layout((shard,), tensors, dict.fromkeys(tensors, shard), None)


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
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
