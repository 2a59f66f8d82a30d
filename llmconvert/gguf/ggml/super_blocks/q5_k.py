"""Q5_K: Q4_K with a fifth bit per code (176 bytes: scale, minimum, 6-bit pairs, high bits, nibbles).

Byte ``i`` of the high bits holds those of weight ``i`` of each of the eight sub-blocks.
"""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.super_blocks.minima import (
    SUPER_BLOCK,
    fit_minimum_super_blocks,
    join_pairs,
    pack_six,
    split_pairs,
    unpack_six,
)

__all__ = ["CODEC", "Q5_K"]


class Q5_K(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q5_K", SUPER_BLOCK, 176, 5, 32
    minima, sub_range = True, (0, 63)

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_minimum_super_blocks(values, importance, self.bits)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.minimum is not None and blocks.sub_scales is not None and blocks.sub_minima is not None
        outer = np.stack([blocks.scale, blocks.minimum], axis=1).view(np.uint8)
        high = blocks.codes.reshape(-1, 8, 32) >> 4
        fifth = np.packbits(high, axis=1, bitorder="little")[:, 0]
        pairs = pack_six(blocks.sub_scales, blocks.sub_minima)
        return np.concatenate([outer, pairs, fifth, join_pairs(blocks.codes & 15)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        outer = raw[:, :4].copy().view(np.float16)
        fifth = np.unpackbits(raw[:, None, 16:48], axis=1, bitorder="little").reshape(len(raw), -1)
        codes = split_pairs(raw[:, 48:]) | (fifth << 4)
        return Blocks(codes, outer[:, 0].copy(), outer[:, 1].copy(), *unpack_six(raw[:, 4:16]))


CODEC = Q5_K()
