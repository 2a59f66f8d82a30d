"""Open GGUF files and the tensors in them as they are stored, dequantized on reading.

Rows are read with ``preadv`` and dequantized a few megabytes at a time, so memory holds what was asked for and little
else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from llmconvert.errors import ChangedError, CheckpointError
from llmconvert.gguf.header import GgufTensor

__all__ = ["OpenedGguf", "can_dequantize", "read_as"]

#: Stored types that need no arithmetic.
_DIRECT: Final[Mapping[GGMLQuantizationType, torch.dtype]] = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
# Elements dequantized at a time: the intermediate arrays are a few times as large.
_PIECE_ELEMENTS: Final = 1 << 18
_READ_CHUNK: Final = 1 << 28


class OpenedGguf:
    """The files of one model; descriptors stay open until :meth:`close`.

    Raises:
        CheckpointError: one cannot be opened.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        self._parts = tuple(parts)
        self._fds: list[int] = []
        for part in parts:
            try:
                self._fds.append(os.open(part, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                self.close()
                raise CheckpointError(f"{part}: cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())

    def __del__(self) -> None:
        if hasattr(self, "_fds"):
            self.close()

    def read_rows(self, tensor: GgufTensor, start: int, stop: int) -> torch.Tensor:
        """Rows as they are stored, dequantized, in fresh memory."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.qtype]
        width = math.prod(tensor.shape[1:])
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=read_as(tensor.qtype))
        if out.numel() == 0:
            return out
        offset = start * width // block * block_bytes
        if tensor.qtype in _DIRECT:
            self.read_bytes(tensor, offset, out.reshape(-1).view(torch.uint8).numpy().data)
        else:
            self._dequantize_into(tensor, offset, out.reshape(-1))
        return out

    def _dequantize_into(self, tensor: GgufTensor, offset: int, out: torch.Tensor) -> None:
        """Fill flat ``out`` with the values of the blocks from byte ``offset`` of ``tensor`` on."""
        block, block_bytes = GGML_QUANT_SIZES[tensor.qtype]
        values = out.numpy()
        blocks = values.size // block
        step = max(1, _PIECE_ELEMENTS // block)
        buffer = np.empty(min(step, blocks) * block_bytes, dtype=np.uint8)
        for done in range(0, blocks, step):
            count = min(step, blocks - done)
            piece = buffer[: count * block_bytes]
            self.read_bytes(tensor, offset + done * block_bytes, piece.data)
            # One long row: the package works on few rows at a time, which is slow when they are short.
            values[done * block : (done + count) * block] = dequantize(piece[None], tensor.qtype)[0]

    def read_bytes(self, tensor: GgufTensor, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with a tensor's bytes from its byte ``offset`` on."""
        path = self._parts[tensor.part]
        if not self._fds:
            raise ValueError(f"{path}: reading {tensor.name} from a closed checkpoint")
        done = 0
        while done < len(buffer):
            try:
                part = buffer[done : done + _READ_CHUNK]
                count = os.preadv(self._fds[tensor.part], [part], tensor.offset + offset + done)
            except OSError as error:
                raise CheckpointError(f"{path}: reading {tensor.name}: {error.strerror}") from error
            if count == 0:
                raise ChangedError(f"{path}: the file ended inside {tensor.name}; it changed on disk")
            done += count


def read_as(qtype: GGMLQuantizationType) -> torch.dtype:
    """The dtype that a stored type reads as."""
    return _DIRECT.get(qtype, torch.float32)


@cache
def can_dequantize(qtype: GGMLQuantizationType) -> bool:
    """Whether the installed ``gguf`` package can dequantize a tensor type."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), dtype=np.uint8), qtype)
    except NotImplementedError:
        return False
    return True
