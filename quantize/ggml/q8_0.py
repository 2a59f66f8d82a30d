"""Q8_0: blocks of 32 weights, ``scale · code`` with int8 codes (34 bytes: float16 scale, 32 codes)."""

from __future__ import annotations

import numpy as np

from llmconvert.quantize.ggml.blocks import Array, Blocks
from llmconvert.quantize.ggml.simple import BLOCK

__all__ = ["CODEC", "Q8_0"]


class Q8_0:
    """See :class:`~llmconvert.quantize.ggml.blocks.Codec`. Importance changes nothing here, as in llama.cpp."""

    name, size, nbytes = "Q8_0", BLOCK, 34

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        return self.pack(self._fit(values.reshape(-1, BLOCK))).reshape(len(values), -1)

    def decode(self, raw: Array) -> Array:
        blocks = self.unpack(raw.reshape(-1, self.nbytes))
        return (blocks.codes * blocks.scale.astype(np.float32)[:, None]).reshape(len(raw), -1)

    def pack(self, blocks: Blocks) -> Array:
        """``[n, nbytes]``."""
        return np.concatenate([blocks.scale[:, None].view(np.uint8), blocks.codes.view(np.uint8)], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        """The inverse of :meth:`pack`."""
        return Blocks(raw[:, 2:].view(np.int8), raw[:, :2].copy().view(np.float16)[:, 0])

    @staticmethod
    def _fit(blocks: Array) -> Blocks:
        scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
        scaled = blocks * inverse
        # Halves away from zero, as C's roundf; adding 0.5 and truncating would round 0.49999997 up.
        whole = np.trunc(scaled)
        codes = whole + np.sign(scaled) * (np.abs(scaled - whole) >= 0.5)
        with np.errstate(over="ignore"):
            return Blocks(codes.astype(np.int8), scale[:, 0].astype(np.float16))


CODEC = Q8_0()
