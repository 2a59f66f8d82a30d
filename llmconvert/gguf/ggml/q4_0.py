"""Q4_0: blocks of 32 weights, ``scale · (code - 8)`` with 4-bit codes (18 bytes: scale, nibbles)."""

from __future__ import annotations

import numpy as np

from llmconvert.gguf.ggml.blocks import Array, Blocks
from llmconvert.gguf.ggml.simple import BLOCK, fit_scale_blocks, join_nibbles, split_nibbles, step_weights

__all__ = ["CODEC", "Q4_0"]


class Q4_0:
    """See :class:`~llmconvert.gguf.ggml.blocks.Codec`."""

    name, size, nbytes = "Q4_0", BLOCK, 18

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        return self.pack(fit_scale_blocks(values, importance, 4)).reshape(len(values), -1)

    def decode(self, raw: Array) -> Array:
        return step_weights(self.unpack(raw.reshape(-1, self.nbytes)), 8).reshape(len(raw), -1)

    def pack(self, blocks: Blocks) -> Array:
        """``[n, nbytes]``."""
        return np.concatenate([blocks.scale[:, None].view(np.uint8), join_nibbles(blocks.codes)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        """The inverse of :meth:`pack`."""
        scale = raw[:, :2].copy().view(np.float16)[:, 0]
        return Blocks(split_nibbles(raw[:, 2:]), scale)


CODEC = Q4_0()
