"""Q5_0: blocks of 32 weights, ``scale · (code - 16)`` with 5-bit codes (22 bytes: scale, high bits, low nibbles)."""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, Blocks
from llmconvert.gguf.ggml.simple import BLOCK, fit_scale_blocks, join_nibbles, split_nibbles, step_weights

__all__ = ["CODEC", "Q5_0"]


class Q5_0:
    """See :class:`~llmconvert.gguf.ggml.blocks.Codec`."""

    name, size, nbytes = "Q5_0", BLOCK, 22

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        return self.pack(fit_scale_blocks(values, importance, 5)).reshape(len(values), -1)

    def decode(self, raw: Array) -> Array:
        return step_weights(self.unpack(raw.reshape(-1, self.nbytes)), 16).reshape(len(raw), -1)

    def pack(self, blocks: Blocks) -> Array:
        """``[n, nbytes]``."""
        high = np.packbits(blocks.codes >> 4, axis=1, bitorder="little")
        return np.concatenate([blocks.scale[:, None].view(np.uint8), high, join_nibbles(blocks.codes & 15)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        """The inverse of :meth:`pack`."""
        high = np.unpackbits(raw[:, 2:6], axis=1, bitorder="little")
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        return Blocks(split_nibbles(raw[:, 6:]) | (high << 4), scale)


CODEC = Q5_0()
