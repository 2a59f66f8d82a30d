"""Q6_K: super-blocks of 256 weights, ``scale · s · (code - 32)`` with 6-bit codes and an int8 ``s`` per 16 weights.

210 bytes: 128 of low nibbles, 64 of high bits, 16 of ``s``, the float16 scale. Parameters are searched for as in
:mod:`~llmconvert.gguf.ggml.super_blocks`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, Blocks, block_importance
from llmconvert.gguf.ggml.fit import FAST, best_step
from llmconvert.gguf.ggml.super_blocks import SUPER_BLOCK

__all__ = ["CODEC", "Q6_K"]

_SUBS = 16
_SUB = SUPER_BLOCK // _SUBS
_ROUNDS = 2
# With levels this fine a few steps do; each is fitted to its codes anyway.
_CANDIDATES = 6
_LOW, _HIGH, _S_LOW, _S_HIGH = -32, 31, -128, 127


class Q6_K:
    """See :class:`~llmconvert.gguf.ggml.blocks.Codec`."""

    name, size, nbytes = "Q6_K", SUPER_BLOCK, 210

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        return self.pack(_fit(values, importance)).reshape(len(values), -1)

    def decode(self, raw: Array) -> Array:
        blocks = self.unpack(raw.reshape(-1, self.nbytes))
        assert blocks.sub_scales is not None
        step = blocks.scale.astype(np.float32)[:, None] * blocks.sub_scales
        codes = blocks.codes.reshape(-1, _SUBS, _SUB).astype(np.float32) - np.float32(32)
        weights: Array = step.astype(np.float32)[..., None] * codes
        return weights.reshape(len(raw), -1)

    def pack(self, blocks: Blocks) -> Array:
        """``[n, nbytes]``."""
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
        """The inverse of :meth:`pack`."""
        n = len(raw)
        low = raw[:, :128].reshape(n, 2, 2, 32)
        high = raw[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
        codes = np.concatenate([low & 15, low >> 4], axis=2) | ((high & 3) << 4)
        scale = raw[:, 208:].copy().view(np.float16)[:, 0]
        return Blocks(codes.reshape(n, SUPER_BLOCK), scale, sub_scales=raw[:, 192:208].copy().view(np.int8))


def _fit(values: Array, importance: Array | None) -> Blocks:
    count, rows = values.size // SUPER_BLOCK, len(values)
    weights = block_importance(importance, values.shape[1])
    steps = np.empty((count, _SUBS), np.float32)
    over_rows(_fit_sub_blocks, rows, values, weights, steps)
    largest = np.take_along_axis(steps, np.abs(steps).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    scale = (largest / np.float32(_S_LOW)).astype(np.float16)
    best, least = scale, np.full(count, np.inf, np.float32)
    subs = np.empty((count, _SUBS), np.int8)
    best_subs = np.zeros_like(subs)
    codes = np.empty((count, SUPER_BLOCK), np.uint8)
    for _ in range(_ROUNDS):
        refit = np.empty((count, 2), np.float32)
        over_rows(_choose_sub_scales, rows, values, weights, steps, scale.astype(np.float32), subs, refit)
        better = refit[:, 1] < least
        least, best = np.where(better, refit[:, 1], least), np.where(better, scale, best)
        best_subs[better] = subs[better]
        scale = refit[:, 0].astype(np.float16)
    over_rows(_take_codes, rows, values, best.astype(np.float32), best_subs, codes)
    return Blocks(codes, best, sub_scales=best_subs)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _fit_sub_blocks(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
) -> None:
    """The best step of every sub-block by itself."""
    x = np.empty(_SUB, np.float32)
    w = np.empty(_SUB, np.float32)
    subs = values.shape[1] // _SUB
    per_row = values.shape[1] // SUPER_BLOCK
    low, high = np.float32(_LOW), np.float32(_HIGH)
    for row in range(begin, end):
        for sub in range(subs):
            for i in range(_SUB):
                x[i] = values[row, sub * _SUB + i]
                w[i] = importance[sub * _SUB + i]
            steps[row * per_row + sub // _SUBS, sub % _SUBS] = best_step(x, w, low, high, _CANDIDATES)


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _choose_sub_scales(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    wide: np.ndarray[Any, Any],
    subs: np.ndarray[Any, Any],
    refit: np.ndarray[Any, Any],
) -> None:
    """For given scales ``wide``: each sub-block's integer among the nearest three, by error.

    ``refit`` gets the scale that suits the choice, and its loss.
    """
    x = np.empty(_SUB, np.float32)
    w = np.empty(_SUB, np.float32)
    zero, one, low, high = np.float32(0), np.float32(1), np.float32(_LOW), np.float32(_HIGH)
    per_row = values.shape[1] // SUPER_BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            n = row * per_row + block
            scale = wide[n]
            aa = ax = total = zero
            for sub in range(_SUBS):
                start = block * SUPER_BLOCK + sub * _SUB
                for i in range(_SUB):
                    x[i] = values[row, start + i]
                    w[i] = importance[start + i]
                near = np.rint(steps[n, sub] / scale) if scale != 0 else zero
                best, least = zero, np.float32(np.inf)
                for ds in range(-1, 2):
                    s = min(max(near + np.float32(ds), np.float32(_S_LOW)), np.float32(_S_HIGH))
                    step = scale * s
                    inverse = one / step if step != 0 else zero
                    loss = zero
                    for i in range(_SUB):
                        error = x[i] - min(max(np.rint(x[i] * inverse), low), high) * step
                        loss += w[i] * error * error
                    if loss < least:
                        best, least = s, loss
                subs[n, sub] = np.int8(best)
                total += least
                step = scale * best
                inverse = one / step if step != 0 else zero
                for i in range(_SUB):
                    a = best * min(max(np.rint(x[i] * inverse), low), high)
                    aa += w[i] * a * a
                    ax += w[i] * a * x[i]
            refit[n, 0], refit[n, 1] = scale, total
            if aa > 0:
                refit[n, 0] = ax / aa


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_codes(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    wide: np.ndarray[Any, Any],
    subs: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
) -> None:
    """The nearest code of every weight for settled parameters."""
    per_row = values.shape[1] // SUPER_BLOCK
    low, high = np.float32(_LOW), np.float32(_HIGH)
    for row in range(begin, end):
        for block in range(per_row):
            n = row * per_row + block
            for sub in range(_SUBS):
                step = wide[n] * np.float32(subs[n, sub])
                inverse = np.float32(1) / step if step != 0 else np.float32(0)
                start = sub * _SUB
                for i in range(_SUB):
                    value = values[row, block * SUPER_BLOCK + start + i]
                    codes[n, start + i] = np.uint8(min(max(np.rint(value * inverse), low), high) - low)


CODEC = Q6_K()
