"""Q2_K: super-blocks of 256 weights with 2-bit codes (84 bytes: 4-bit pairs per 16 weights, codes, scale, minimum).

Each 32 bytes of codes hold 128 weights: weights i, i + 32, i + 64 and i + 96 share a byte.
"""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.super_blocks.minima import (
    SUPER_BLOCK,
    fit_minimum_super_blocks,
    join_quarters,
    split_quarters,
)

__all__ = ["CODEC", "Q2_K"]


class Q2_K(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q2_K", SUPER_BLOCK, 84, 2, 16
    minima, sub_range = True, (0, 15)

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_minimum_super_blocks(values, importance, self.bits, sub_blocks=16, top=15)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.minimum is not None and blocks.sub_scales is not None and blocks.sub_minima is not None
        outer = np.stack([blocks.scale, blocks.minimum], axis=1).view(np.uint8)
        pairs = blocks.sub_scales | (blocks.sub_minima << 4)
        return np.concatenate([pairs, join_quarters(blocks.codes), outer], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        outer = raw[:, 80:].copy().view(np.float16)
        codes, pairs = split_quarters(raw[:, 16:80]), raw[:, :16]
        return Blocks(codes, outer[:, 0].copy(), outer[:, 1].copy(), pairs & 15, pairs >> 4)


CODEC = Q2_K()
