"""Q5_0: blocks of 32 weights, ``scale · (code - 16)`` with 5-bit codes (22 bytes: scale, high bits, low nibbles)."""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.simple.blocks import BLOCK, fit_scale_blocks, join_nibbles, split_nibbles

__all__ = ["CODEC", "Q5_0"]


class Q5_0(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q5_0", BLOCK, 22, 5, BLOCK
    shift = 16

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_scale_blocks(values, importance, self.bits)

    def pack(self, blocks: Blocks) -> Array:
        high = np.packbits(blocks.codes >> 4, axis=1, bitorder="little")
        return np.concatenate([blocks.scale[:, None].view(np.uint8), high, join_nibbles(blocks.codes & 15)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        high = np.unpackbits(raw[:, 2:6], axis=1, bitorder="little")
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        return Blocks(split_nibbles(raw[:, 6:]) | (high << 4), scale)


CODEC = Q5_0()
