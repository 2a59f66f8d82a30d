"""IQ4_XS: super-blocks of 256 weights, ``scale · s · level``: 4-bit codes of IQ4_NL's table, a 6-bit ``s`` per 32.

136 bytes: the float16 scale, 2 of the upper bits of ``s + 32``, 4 of their low nibbles, nibbles of each 32 weights.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, BlockCodec, Blocks, block_importance
from llmconvert.gguf.ggml.fit import LANES, take_lanes
from llmconvert.gguf.ggml.levels import LEVELS, fit_level_steps, nearest_level, sum_levels
from llmconvert.gguf.ggml.super_blocks.minima import SUPER_BLOCK
from llmconvert.gguf.ggml.super_blocks.sub_scales import add_choice, fit_scales, take_scales

__all__ = ["CODEC", "IQ4_XS"]

_SUB = 32
_SUBS = SUPER_BLOCK // _SUB
_ROUNDS = 3
_S_LOW, _S_HIGH = -32, 31


class IQ4_XS(BlockCodec):
    """See :class:`~llmconvert.gguf.ggml.blocks.BlockCodec`."""

    name, size, nbytes, bits, group = "IQ4_XS", SUPER_BLOCK, 136, 4, _SUB
    levels, sub_range = LEVELS, (_S_LOW, _S_HIGH)

    def fit(self, values: Array, importance: Array | None = None) -> Blocks:
        count, rows = values.size // SUPER_BLOCK, len(values)
        weights = block_importance(importance, values.shape[1])
        steps = np.empty((rows, values.shape[1] // _SUB), np.float32)
        over_rows(fit_level_steps, rows, values, weights, steps)

        def choose(wide: Array, subs: Array, refit: Array) -> None:
            over_rows(_choose_sub_scales, rows, values, weights, steps, wide, subs, refit)

        best, best_subs = fit_scales(steps.reshape(count, _SUBS), _S_LOW, _ROUNDS, choose)
        codes = np.empty((count, SUPER_BLOCK), np.uint8)
        over_rows(_take_codes, rows, values, best.astype(np.float32), best_subs, codes)
        return Blocks(codes, best, sub_scales=best_subs)

    def pack(self, blocks: Blocks) -> Array:
        assert blocks.sub_scales is not None
        n = len(blocks.codes)
        subs = (blocks.sub_scales.astype(np.int16) - _S_LOW).astype(np.uint16)
        upper = ((subs >> 4) << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1, dtype=np.uint16)
        lower = (subs[:, ::2] & 15 | (subs[:, 1::2] & 15) << 4).astype(np.uint8)
        pairs = blocks.codes.reshape(n, _SUBS, 2, _SUB // 2)
        nibbles = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(n, -1)
        outer = np.stack([blocks.scale.view(np.uint16), upper], axis=1).view(np.uint8)
        return np.concatenate([outer, lower, nibbles], axis=1)

    def unpack(self, raw: Array) -> Blocks:
        n = len(raw)
        outer = raw[:, :4].copy().view(np.uint16)
        upper = (outer[:, 1:] >> np.arange(0, 16, 2, dtype=np.uint16) & 3).astype(np.uint8)
        lower = np.stack([raw[:, 4:8] & 15, raw[:, 4:8] >> 4], axis=2).reshape(n, -1)
        subs = (lower | (upper << 4)).astype(np.int8) + np.int8(_S_LOW)
        nibbles = raw[:, 8:].reshape(n, _SUBS, _SUB // 2)
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=2).reshape(n, -1)
        return Blocks(codes, outer[:, 0].copy().view(np.float16), sub_scales=subs)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
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
    per_row = values.shape[1] // SUPER_BLOCK
    zero = np.float32(0)
    x, tried = np.zeros((_SUB, LANES), np.float32), np.zeros((2, LANES), np.float32)
    sums, form = np.zeros((4, LANES), np.float32), np.zeros((3, LANES), np.float32)
    scale, near = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    # Integers, losses, and the sums of squared levels and of levels times values.
    best = np.zeros((4, LANES), np.float32)
    for first in range(begin, end, LANES):
        height = min(LANES, end - first)
        for block in range(per_row):
            for lane in range(height):
                scale[lane] = wide[(first + lane) * per_row + block]
            form[:] = 0
            for sub in range(_SUBS):
                start, group = block * SUPER_BLOCK + sub * _SUB, block * _SUBS + sub
                take_lanes(values, first, height, start, x)
                w = importance[start : start + _SUB]
                for lane in range(height):
                    near[lane] = np.rint(steps[first + lane, group] / scale[lane]) if scale[lane] != 0 else zero
                best[0], best[1] = zero, np.float32(np.inf)
                for ds in range(-1, 2):
                    for lane in range(LANES):
                        step = scale[lane] * _bounded(near[lane] + np.float32(ds))
                        tried[0, lane], tried[1, lane] = step, np.float32(1) / step if step != 0 else zero
                    sum_levels(x, w, tried, sums)
                    for lane in range(LANES):
                        better = sums[2, lane] < best[1, lane]
                        best[0, lane] = _bounded(near[lane] + np.float32(ds)) if better else best[0, lane]
                        best[1, lane] = sums[2, lane] if better else best[1, lane]
                        best[2, lane] = sums[1, lane] if better else best[2, lane]
                        best[3, lane] = sums[3, lane] if better else best[3, lane]
                add_choice(best, best[2], best[3], form)
                for lane in range(height):
                    subs[(first + lane) * per_row + block, sub] = np.int8(best[0, lane])
            take_scales(form, scale, height, first * per_row + block, per_row, refit)


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def _bounded(s: Any) -> Any:
    return min(max(s, np.float32(_S_LOW)), np.float32(_S_HIGH))


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
    for row in range(begin, end):
        for block in range(per_row):
            n = row * per_row + block
            for sub in range(_SUBS):
                step = wide[n] * np.float32(subs[n, sub])
                inverse = np.float32(1) / step if step != 0 else np.float32(0)
                for i in range(sub * _SUB, (sub + 1) * _SUB):
                    codes[n, i] = nearest_level(values[row, block * SUPER_BLOCK + i] * inverse)


CODEC = IQ4_XS()
