"""Q4_0: blocks of 32 weights, ``scale · (code - 8)`` with 4-bit codes (18 bytes: scale, nibbles)."""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.simple.blocks import BLOCK, fit_scale_blocks, join_nibbles, split_nibbles

__all__ = ["CODEC", "Q4_0"]


class Q4_0(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q4_0", BLOCK, 18, 4, BLOCK
    shift = 8

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_scale_blocks(values, importance, self.bits)

    def pack(self, blocks: Blocks) -> Array:
        return np.concatenate([blocks.scale[:, None].view(np.uint8), join_nibbles(blocks.codes)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        return Blocks(split_nibbles(raw[:, 2:]), scale)


CODEC = Q4_0()
