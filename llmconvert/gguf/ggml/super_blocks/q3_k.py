"""Q3_K: super-blocks of 256 weights, ``scale · s · (code - 4)`` with 3-bit codes and a 6-bit ``s`` per 16 weights.

110 bytes: 32 of third bits, 64 of codes' lower bits as in Q2_K, 12 of ``s + 32``, the float16 scale. Byte ``i`` of the
third bits holds those of weights ``i``, ``i + 32``, …
"""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.fit import CANDIDATES
from llmconvert.gguf.ggml.super_blocks.minima import SUPER_BLOCK, join_quarters, split_quarters
from llmconvert.gguf.ggml.super_blocks.steps import SUB_BLOCK, fit_step_super_blocks

__all__ = ["CODEC", "Q3_K"]


class Q3_K(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q3_K", SUPER_BLOCK, 110, 3, SUB_BLOCK
    shift, sub_range = 4, (-32, 31)

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_step_super_blocks(values, importance, self.bits, self.sub_range, candidates=CANDIDATES, rounds=3)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.sub_scales is not None
        n = len(blocks.codes)
        third = np.packbits(blocks.codes.reshape(n, 8, 32) >> 2, axis=1, bitorder="little")[:, 0]
        # Of each s the low nibble, two to a byte; then the upper two bits, four to a byte.
        subs = (blocks.sub_scales.astype(np.int16) + 32).astype(np.uint8)
        two = (subs >> 4).reshape(n, 4, 4)
        upper = two[:, 0] | (two[:, 1] << 2) | (two[:, 2] << 4) | (two[:, 3] << 6)
        parts = third, join_quarters(blocks.codes & 3), (subs[:, :8] & 15) | ((subs[:, 8:] & 15) << 4), upper
        return np.concatenate([*parts, blocks.scale[:, None].view(np.uint8)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        n = len(raw)
        third = np.unpackbits(raw[:, None, :32], axis=1, bitorder="little").reshape(n, -1)
        nibbles = raw[:, 96:104]
        upper = ((raw[:, 104:108].reshape(n, 1, 4) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)) & 3).reshape(
            n, 16
        )
        subs = np.concatenate([nibbles & 15, nibbles >> 4], axis=1) | (upper << 4)
        scale = raw[:, 108:].copy().view(np.float16)[:, 0]
        return Blocks(
            split_quarters(raw[:, 32:96]) | (third << 2), scale, sub_scales=subs.astype(np.int8) - np.int8(32)
        )


CODEC = Q3_K()
