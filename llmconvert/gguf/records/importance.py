"""Importance matrices in llama.cpp's files: the mean squares of every linear's inputs, as ``llama-imatrix`` keeps them.

The older format (``imatrix.dat``) is a count of entries, for each its name, how many chunks it was summed over and the
sums, float32, then the number of chunks and the text's name. Since 2025 it is a GGUF file (``general.type: imatrix``)
with ``NAME.in_sum2``, sums of squares ``[matrices, columns]``, and ``NAME.counts``, tokens ``[matrices, 1]``. Names are
those of the weights in GGUF files, ``blk.0.attn_q.weight``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from gguf.constants import GGMLQuantizationType

from llmconvert.errors import CheckpointError
from llmconvert.gguf.header import parse_gguf_header, read_gguf_header
from llmconvert.gguf.layout import GgufSpec, plan_gguf
from llmconvert.storage.writer import write_file

__all__ = ["ImportanceMatrix", "read_importance", "write_importance"]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME: Final = 1 << 10


@dataclass(frozen=True, slots=True)
class ImportanceMatrix:
    """What a file holds.

    Attributes:
        squares: by the weight's name in GGUF files, float32 ``[columns]``, or ``[experts, columns]`` of tensors that
            hold several matrices; the mean squares of inputs.
        tokens: by that name how many tokens each matrix was measured on, ``[experts]`` or ``[1]``.
        datasets: the names of texts.
        chunks: windows of text.
        chunk_tokens: tokens of a window; 0 where the file does not say.
    """

    squares: Mapping[str, np.ndarray]
    tokens: Mapping[str, np.ndarray]
    datasets: tuple[str, ...] = ()
    chunks: int = 0
    chunk_tokens: int = 0


def read_importance(path: Path) -> ImportanceMatrix:
    """Read a file of either format.

    Raises:
        CheckpointError: it is neither, cut off, or holds values that are negative or not finite.
    """
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_legacy(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    for name, squares in found.squares.items():
        if not np.isfinite(squares).all() or (squares < 0).any():
            raise CheckpointError(f"{path}: the importance of {name} is negative or not finite; the file is damaged")
    return found


def write_importance(path: Path, matrix: ImportanceMatrix) -> None:
    """Write a file: in the older format if its name ends with ``.dat``, else as GGUF.

    Raises:
        OutputError, CapacityError: it cannot be written.
    """
    write_file(path, _legacy(matrix) if path.suffix == ".dat" else _gguf(path.name, matrix))


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_gguf_header(path)
    kind = header.metadata.text("general.type", "")
    if kind != "imatrix":
        raise CheckpointError(f"{path}: general.type is {kind!r}, expected 'imatrix'; this is no importance matrix")
    values: dict[str, np.ndarray] = {}
    with path.open("rb") as file:
        for name, tensor in header.tensors.items():
            if tensor.qtype != GGMLQuantizationType.F32:
                raise CheckpointError(f"{path}: {name} is {tensor.qtype.name}, expected F32")
            file.seek(tensor.offset)
            values[name] = np.frombuffer(file.read(tensor.nbytes), np.float32).reshape(tensor.shape)
    squares: dict[str, np.ndarray] = {}
    tokens: dict[str, np.ndarray] = {}
    for stored, sums in values.items():
        if not stored.endswith(_SUMS):
            continue
        name = stored.removesuffix(_SUMS)
        counts = values.get(name + _COUNTS)
        rows = sums.reshape(-1, sums.shape[-1])
        if counts is None or counts.size != len(rows):
            raise CheckpointError(f"{path}: {name}{_COUNTS} is missing or of another size than {stored}")
        squares[name], tokens[name] = _means(rows, counts.reshape(-1)), counts.reshape(-1)
    if not squares:
        raise CheckpointError(f"{path}: no tensor ends with {_SUMS}; this is no importance matrix")
    data = header.metadata
    return ImportanceMatrix(
        squares,
        tokens,
        tuple(data.strings("imatrix.datasets")) if "imatrix.datasets" in data else (),
        data.integer("imatrix.chunk_count", 0),
        data.integer("imatrix.chunk_size", 0),
    )


def _means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``[columns]`` of one matrix, ``[matrices, columns]`` of several; those that no token reached are all alike."""
    means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], np.float32(1)).astype(np.float32)
    return means[0] if len(means) == 1 else means


def _read_legacy(path: Path, raw: bytes) -> ImportanceMatrix:
    position = 0

    def take(count: int) -> bytes:
        nonlocal position
        if not 0 <= count <= len(raw) - position:
            raise CheckpointError(f"{path}: is no importance matrix of llama.cpp, or cut off at byte {position:,}")
        position += count
        return raw[position - count : position]

    def integer() -> int:
        return int(struct.unpack("<i", take(4))[0])

    squares: dict[str, np.ndarray] = {}
    tokens: dict[str, np.ndarray] = {}
    for _ in range(integer()):
        length = integer()
        name = take(length if length <= _LONGEST_NAME else -1).decode(errors="replace")
        chunks, columns = integer(), integer()
        sums = np.frombuffer(take(4 * columns), np.float32)
        squares[name] = sums / max(chunks, 1)
        tokens[name] = np.array([max(chunks, 0)], np.float32)
    if not squares:
        raise CheckpointError(f"{path}: holds no entries; it is no importance matrix of llama.cpp")
    chunks, text = 0, ""
    if position < len(raw):  # files of 2023 end here
        chunks = integer()
        text = take(integer()).decode(errors="replace")
    return ImportanceMatrix(squares, tokens, (text,) if text else (), chunks)


def _legacy(matrix: ImportanceMatrix) -> bytes:
    chunks = max(matrix.chunks, 1)
    parts = [struct.pack("<i", len(matrix.squares))]
    for name, squares in matrix.squares.items():
        raw, values = name.encode(), np.ascontiguousarray(squares, np.float32).reshape(-1)
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<ii", chunks, values.size)]
        parts.append((values * np.float32(chunks)).tobytes())
    text = ",".join(matrix.datasets).encode()
    return b"".join([*parts, struct.pack("<ii", chunks, len(text)), text])


def _gguf(file_name: str, matrix: ImportanceMatrix) -> bytes:
    values: dict[str, np.ndarray] = {}
    for name, squares in matrix.squares.items():
        rows = np.ascontiguousarray(squares, np.float32).reshape(-1, squares.shape[-1])
        counts = np.asarray(matrix.tokens[name], np.float32).reshape(-1, 1)
        values[name + _SUMS], values[name + _COUNTS] = rows * counts, counts
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": matrix.chunks,
        "imatrix.chunk_size": matrix.chunk_tokens,
    }
    layout = plan_gguf(file_name, metadata, [GgufSpec(name, "F32", value.shape) for name, value in values.items()])
    (shard,) = layout.shards
    whole = bytearray(shard.nbytes)
    whole[: len(shard.header)] = shard.header
    for name, value in values.items():
        begin = shard.offsets[name]
        whole[begin : begin + value.nbytes] = value.astype("<f4").tobytes()
    parse_gguf_header(Path(file_name), shard.header, shard.nbytes)
    return bytes(whole)
