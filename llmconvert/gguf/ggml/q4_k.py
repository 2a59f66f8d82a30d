"""Q4_K: super-blocks of 256 weights with 4-bit codes (144 bytes: scale, minimum, 6-bit pairs, nibbles).

Two sub-blocks share 32 bytes, the first in the low nibbles.
"""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, Blocks
from llmconvert.gguf.ggml.super_blocks import (
    SUPER_BLOCK,
    decode_minimum_super_blocks,
    fit_minimum_super_blocks,
    pack_six,
    unpack_six,
)

__all__ = ["CODEC", "Q4_K", "join_pairs", "split_pairs"]


class Q4_K:
    """See :class:`~llmconvert.gguf.ggml.blocks.Codec`."""

    name, size, nbytes = "Q4_K", SUPER_BLOCK, 144

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        return self.pack(fit_minimum_super_blocks(values, importance, 4)).reshape(len(values), -1)

    def decode(self, raw: Array) -> Array:
        return decode_minimum_super_blocks(self.unpack(raw.reshape(-1, self.nbytes))).reshape(len(raw), -1)

    def pack(self, blocks: Blocks) -> Array:
        """``[n, nbytes]``."""
        assert blocks.minimum is not None and blocks.sub_scales is not None and blocks.sub_minima is not None
        outer = np.stack([blocks.scale, blocks.minimum], axis=1).view(np.uint8)
        return np.concatenate([outer, pack_six(blocks.sub_scales, blocks.sub_minima), join_pairs(blocks.codes)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        """The inverse of :meth:`pack`."""
        outer = raw[:, :4].copy().view(np.float16)
        return Blocks(split_pairs(raw[:, 16:]), outer[:, 0].copy(), outer[:, 1].copy(), *unpack_six(raw[:, 4:16]))


def join_pairs(codes: Array) -> Array:
    """``[n, 256]`` codes below 16 → ``[n, 128]`` bytes; of every 64 the second half goes into the high nibbles."""
    pairs = codes.reshape(len(codes), -1, 2, 32)
    joined: Array = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    return joined.reshape(len(codes), -1)


def split_pairs(raw: Array) -> Array:
    """The inverse of :func:`join_pairs`."""
    joined = raw.reshape(len(raw), -1, 32)
    return np.stack([joined & 15, joined >> 4], axis=2).reshape(len(raw), -1)


CODEC = Q4_K()
