"""Q4_1: blocks of 32 weights, ``scale · code + minimum`` with 4-bit codes: scale, minimum, nibbles (20 bytes)."""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.simple.blocks import BLOCK, fit_minimum_blocks, join_nibbles, split_nibbles

__all__ = ["CODEC", "Q4_1"]


class Q4_1(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q4_1", BLOCK, 20, 4, BLOCK
    minima = True

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_minimum_blocks(values, importance, self.bits)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.minimum is not None
        outer = np.stack([blocks.scale, blocks.minimum], axis=1).view(np.uint8)
        return np.concatenate([outer, join_nibbles(blocks.codes)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        minimum = raw[:, 2:4].copy().view(np.float16)[:, 0]
        return Blocks(split_nibbles(raw[:, 4:]), scale, minimum)


CODEC = Q4_1()
