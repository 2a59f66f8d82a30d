"""Q4_K: super-blocks of 256 weights with 4-bit codes (144 bytes: scale, minimum, 6-bit pairs, nibbles).

Two sub-blocks share 32 bytes, the first in the low nibbles.
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

__all__ = ["CODEC", "Q4_K"]


class Q4_K(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q4_K", SUPER_BLOCK, 144, 4, 32
    minima, sub_range = True, (0, 63)

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        return fit_minimum_super_blocks(values, importance, self.bits)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.minimum is not None and blocks.sub_scales is not None and blocks.sub_minima is not None
        outer = np.stack([blocks.scale, blocks.minimum], axis=1).view(np.uint8)
        return np.concatenate([outer, pack_six(blocks.sub_scales, blocks.sub_minima), join_pairs(blocks.codes)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        outer = raw[:, :4].copy().view(np.float16)
        return Blocks(split_pairs(raw[:, 16:]), outer[:, 0].copy(), outer[:, 1].copy(), *unpack_six(raw[:, 4:16]))


CODEC = Q4_K()
