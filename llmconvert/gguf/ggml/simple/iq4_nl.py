"""IQ4_NL: blocks of 32 weights, ``scale · level`` with 4-bit codes of a table (18 bytes: scale, nibbles)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks, block_importance
from llmconvert.gguf.ggml.levels import LEVELS, fit_level_steps, nearest_level
from llmconvert.gguf.ggml.simple.blocks import BLOCK, half, join_nibbles, split_nibbles

__all__ = ["CODEC", "IQ4_NL"]


class IQ4_NL(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "IQ4_NL", BLOCK, 18, 4, BLOCK
    levels = LEVELS

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        rows, columns = values.shape
        steps = np.empty((rows, columns // BLOCK), np.float32)
        over_rows(fit_level_steps, rows, values, block_importance(importance, columns), steps)
        scale = half(steps.reshape(-1))
        codes = np.empty((len(scale), BLOCK), np.uint8)
        over_rows(_take_codes, rows, values, scale.astype(np.float32), codes)
        return Blocks(codes, scale)

    def pack(self, blocks: Blocks) -> Array:
        return np.concatenate([blocks.scale[:, None].view(np.uint8), join_nibbles(blocks.codes)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        return Blocks(split_nibbles(raw[:, 2:]), raw[:, :2].copy().view(np.float16)[:, 0])


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_codes(
    begin: int, end: int, values: np.ndarray[Any, Any], steps: np.ndarray[Any, Any], codes: np.ndarray[Any, Any]
) -> None:
    """The nearest code of every weight for settled steps."""
    blocks = values.shape[1] // BLOCK
    for row in range(begin, end):
        for block in range(blocks):
            n = row * blocks + block
            inverse = np.float32(1) / steps[n] if steps[n] != 0 else np.float32(0)
            for i in range(BLOCK):
                codes[n, i] = nearest_level(values[row, block * BLOCK + i] * inverse)


CODEC = IQ4_NL()
