"""Q4_1: blocks of 32 weights, ``scale · code + minimum`` with 4-bit codes: scale, minimum, nibbles (20 bytes)."""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, Blocks
from llmconvert.gguf.ggml.simple import BLOCK, affine_weights, fit_minimum_blocks, join_nibbles, split_nibbles

__all__ = ["CODEC", "Q4_1"]


class Q4_1:
    """See :class:`~llmconvert.gguf.ggml.blocks.Codec`."""

    name, size, nbytes = "Q4_1", BLOCK, 20

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        return self.pack(fit_minimum_blocks(values, importance, 4)).reshape(len(values), -1)

    def decode(self, raw: Array) -> Array:
        return affine_weights(self.unpack(raw.reshape(-1, self.nbytes))).reshape(len(raw), -1)

    def pack(self, blocks: Blocks) -> Array:
        """``[n, nbytes]``."""
        assert blocks.minimum is not None
        outer = np.stack([blocks.scale, blocks.minimum], axis=1).view(np.uint8)
        return np.concatenate([outer, join_nibbles(blocks.codes)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        """The inverse of :meth:`pack`."""
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        minimum = raw[:, 2:4].copy().view(np.float16)[:, 0]
        return Blocks(split_nibbles(raw[:, 4:]), scale, minimum)


CODEC = Q4_1()
