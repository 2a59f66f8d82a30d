"""Q6_K: super-blocks of 256 weights, ``scale · s · (code - 32)`` with 6-bit codes and an int8 ``s`` per 16 weights.

210 bytes: 128 of low nibbles, 64 of high bits, 16 of ``s``, the float16 scale.
"""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks
from llmconvert.gguf.ggml.super_blocks.minima import SUPER_BLOCK
from llmconvert.gguf.ggml.super_blocks.steps import SUB_BLOCK, fit_step_super_blocks

__all__ = ["CODEC", "Q6_K"]


class Q6_K(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "Q6_K", SUPER_BLOCK, 210, 6, SUB_BLOCK
    shift, sub_range = 32, (-128, 127)

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        # With levels this fine a few steps do; each is fitted to its codes anyway.
        return fit_step_super_blocks(values, importance, self.bits, self.sub_range, candidates=6, rounds=2)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.sub_scales is not None
        n = len(blocks.codes)
        # Halves of 128 weights; within one, weights i, i + 32, i + 64 and i + 96 share a byte of high bits.
        quarters = blocks.codes.reshape(n, 2, 4, 32)
        low = (quarters & 15)[:, :, :2] | ((quarters & 15)[:, :, 2:] << 4)
        two = quarters >> 4
        high = two[:, :, 0] | (two[:, :, 1] << 2) | (two[:, :, 2] << 4) | (two[:, :, 3] << 6)
        parts = (low.reshape(n, -1), high.reshape(n, -1), blocks.sub_scales.view(np.uint8))
        return np.concatenate([*parts, blocks.scale[:, None].view(np.uint8)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        n = len(raw)
        low = raw[:, :128].reshape(n, 2, 2, 32)
        high = raw[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
        codes = np.concatenate([low & 15, low >> 4], axis=2) | ((high & 3) << 4)
        scale = raw[:, 208:].copy().view(np.float16)[:, 0]
        return Blocks(codes.reshape(n, SUPER_BLOCK), scale, sub_scales=raw[:, 192:208].copy().view(np.int8))


CODEC = Q6_K()
