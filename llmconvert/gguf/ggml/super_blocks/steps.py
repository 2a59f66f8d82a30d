"""K-quants without minima (Q3_K, Q6_K): super-blocks of 256 weights, and the search for their parameters.

A weight is ``scale · s · (code - zero)`` with a signed integer ``s`` per 16 weights. Parameters are searched for as in
:mod:`~llmconvert.gguf.ggml.super_blocks.minima`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, Blocks, block_importance
from llmconvert.gguf.ggml.fit import LANES, fit_steps, take_lanes
from llmconvert.gguf.ggml.super_blocks.choice import sum_codes, sum_losses
from llmconvert.gguf.ggml.super_blocks.minima import SUPER_BLOCK
from llmconvert.gguf.ggml.super_blocks.sub_scales import add_choice, fit_scales, take_scales

__all__ = ["SUB_BLOCK", "fit_step_super_blocks"]

SUB_BLOCK = 16
_SUBS = SUPER_BLOCK // SUB_BLOCK


def fit_step_super_blocks(
    values: Array, importance: Array | None, bits: int, sub_range: tuple[int, int], *, candidates: int, rounds: int
) -> Blocks:
    """Super-blocks for float32 ``[rows, columns]`` with signed codes of ``bits``.

    Args:
        values: finite.
        importance: see :meth:`~llmconvert.gguf.ggml.blocks.Codec.encode`.
        bits: of a code.
        sub_range: the least and the greatest ``s``.
        candidates: steps tried for each sub-block and sign.
        rounds: how often ``s`` and the scale are fitted to each other.
    """
    count, rows = values.size // SUPER_BLOCK, len(values)
    weights = block_importance(importance, values.shape[1])
    limits = np.float32(-(1 << (bits - 1))), np.float32((1 << (bits - 1)) - 1)
    bounds = np.float32(sub_range[0]), np.float32(sub_range[1])
    steps = np.empty((rows, values.shape[1] // SUB_BLOCK), np.float32)
    over_rows(fit_steps, rows, values, weights, steps, *limits, candidates)

    def choose(wide: Array, subs: Array, refit: Array) -> None:
        over_rows(_choose_sub_scales, rows, values, weights, steps, wide, subs, refit, *limits, *bounds)

    best, best_subs = fit_scales(steps.reshape(count, _SUBS), sub_range[0], rounds, choose)
    codes = np.empty((count, SUPER_BLOCK), np.uint8)
    over_rows(_take_codes, rows, values, best.astype(np.float32), best_subs, codes, *limits)
    return Blocks(codes, best, sub_scales=best_subs)


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
    low: float,
    high: float,
    least_sub: float,
    most_sub: float,
) -> None:
    """For given scales ``wide``: each sub-block's integer among the nearest three, by error.

    ``refit`` gets the scale that suits the choice, and its loss.
    """
    per_row = values.shape[1] // SUPER_BLOCK
    zero = np.float32(0)
    x = np.zeros((SUB_BLOCK, LANES), np.float32)
    tried, sums, losses = (
        np.zeros((3, LANES), np.float32),
        np.zeros((4, LANES), np.float32),
        np.zeros(LANES, np.float32),
    )
    scale, near = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    best, form = np.zeros((2, LANES), np.float32), np.zeros((3, LANES), np.float32)
    for first in range(begin, end, LANES):
        height = min(LANES, end - first)
        for block in range(per_row):
            for lane in range(height):
                scale[lane] = wide[(first + lane) * per_row + block]
            form[:] = 0
            for sub in range(_SUBS):
                start, group = block * SUPER_BLOCK + sub * SUB_BLOCK, block * _SUBS + sub
                take_lanes(values, first, height, start, x)
                w = importance[start : start + SUB_BLOCK]
                for lane in range(height):
                    near[lane] = np.rint(steps[first + lane, group] / scale[lane]) if scale[lane] != 0 else zero
                best[0], best[1] = zero, np.float32(np.inf)
                for ds in range(-1, 2):
                    _try_subs(near, ds, scale, tried, least_sub, most_sub)
                    sum_losses(x, w, tried, losses, low, high)
                    for lane in range(LANES):
                        s = min(max(near[lane] + np.float32(ds), least_sub), most_sub)
                        better = losses[lane] < best[1, lane]
                        best[0, lane] = s if better else best[0, lane]
                        best[1, lane] = losses[lane] if better else best[1, lane]
                _try_subs(best[0], 0, scale, tried, least_sub, most_sub)
                sum_codes(x, w, tried, sums, low, high)
                add_choice(best, sums[1], sums[2], form)
                for lane in range(height):
                    subs[(first + lane) * per_row + block, sub] = np.int8(best[0, lane])
            take_scales(form, scale, height, first * per_row + block, per_row, refit)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _try_subs(
    near: np.ndarray[Any, Any],
    ds: int,
    scale: np.ndarray[Any, Any],
    tried: np.ndarray[Any, Any],
    least: float,
    most: float,
) -> None:
    """Steps of sub-blocks whose integers are ``near + ds``, within bounds."""
    for lane in range(LANES):
        step = scale[lane] * min(max(near[lane] + np.float32(ds), least), most)
        tried[0, lane], tried[1, lane] = step, np.float32(1) / step if step != 0 else np.float32(0)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_codes(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    wide: np.ndarray[Any, Any],
    subs: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    low: float,
    high: float,
) -> None:
    """The nearest code of every weight for settled parameters."""
    per_row = values.shape[1] // SUPER_BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            n = row * per_row + block
            for sub in range(_SUBS):
                step = wide[n] * np.float32(subs[n, sub])
                inverse = np.float32(1) / step if step != 0 else np.float32(0)
                start = sub * SUB_BLOCK
                for i in range(SUB_BLOCK):
                    value = values[row, block * SUPER_BLOCK + start + i]
                    codes[n, start + i] = np.uint8(min(max(np.rint(value * inverse), low), high) - low)
