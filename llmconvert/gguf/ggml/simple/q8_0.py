"""Q8_0: blocks of 32 weights, ``scale · code`` with int8 codes (34 bytes: float16 scale, 32 codes)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.simple.blocks import BLOCK, half

__all__ = ["CODEC", "Q8_0"]


class Q8_0(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`. Importance changes nothing here, as in llama.cpp."""

    name, size, nbytes, bits, group = "Q8_0", BLOCK, 34, 8, BLOCK

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return self.unpack(self.encode(values).reshape(-1, self.nbytes))

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        raw = np.empty((values.size // BLOCK, self.nbytes), np.uint8)
        scales = np.empty(len(raw), np.float32)
        # Codes go straight to their place: copying them once more would take as long as finding them.
        over_rows(_take_codes, len(values), values, raw[:, 2:].view(np.int8), scales)
        raw[:, :2] = half(scales)[:, None].view(np.uint8)
        return raw.reshape(len(values), -1)

    def pack(self, blocks: Blocks) -> Array:
        return np.concatenate([blocks.scale[:, None].view(np.uint8), blocks.codes.view(np.uint8)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        return Blocks(raw[:, 2:].view(np.int8), raw[:, :2].copy().view(np.float16)[:, 0])


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_codes(
    begin: int, end: int, values: np.ndarray[Any, Any], codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]
) -> None:
    """The largest magnitude of a block becomes 127; scales are float32 here, which decides ties."""
    per_row = values.shape[1] // BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            n, start = row * per_row + block, block * BLOCK
            largest = np.float32(0)
            for i in range(BLOCK):
                largest = max(largest, abs(values[row, start + i]))
            scale = largest / np.float32(127)
            inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
            scales[n] = scale
            for i in range(BLOCK):
                scaled = values[row, start + i] * inverse
                # Halves away from zero, as C's roundf; adding 0.5 and truncating would round 0.49999997 up.
                whole = np.trunc(scaled)
                rest = scaled - whole
                codes[n, i] = np.int8(
                    whole + np.float32(rest >= np.float32(0.5)) - np.float32(rest <= np.float32(-0.5))
                )


CODEC = Q8_0()
