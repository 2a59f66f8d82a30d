"""Q5_1: blocks of 32, ``scale · code + minimum`` with 5-bit codes: scale, minimum, high bits, nibbles (24 bytes)."""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.simple.blocks import BLOCK, fit_minimum_blocks, join_nibbles, split_nibbles

__all__ = ["CODEC", "Q5_1"]


class Q5_1(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q5_1", BLOCK, 24, 5, BLOCK
    minima = True

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_minimum_blocks(values, importance, self.bits)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.minimum is not None
        high = np.packbits(blocks.codes >> 4, axis=1, bitorder="little")
        outer = np.stack([blocks.scale, blocks.minimum], axis=1).view(np.uint8)
        return np.concatenate([outer, high, join_nibbles(blocks.codes & 15)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        high = np.unpackbits(raw[:, 4:8], axis=1, bitorder="little")
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        minimum = raw[:, 2:4].copy().view(np.float16)[:, 0]
        return Blocks(split_nibbles(raw[:, 8:]) | (high << 4), scale, minimum)


CODEC = Q5_1()
