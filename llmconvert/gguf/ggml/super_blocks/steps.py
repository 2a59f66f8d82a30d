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
from llmconvert.gguf.ggml.fit import FAST, ROUNDS, TINY
from llmconvert.gguf.ggml.super_blocks.minima import SUPER_BLOCK

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
    steps = np.empty((count, _SUBS), np.float32)
    over_rows(_fit_sub_blocks, rows, values, weights, steps, *limits, candidates)
    largest = np.take_along_axis(steps, np.abs(steps).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    scale = (largest / bounds[0]).astype(np.float16)
    best, least = scale, np.full(count, np.inf, np.float32)
    subs = np.empty((count, _SUBS), np.int8)
    best_subs = np.zeros_like(subs)
    codes = np.empty((count, SUPER_BLOCK), np.uint8)
    for _ in range(rounds):
        refit = np.empty((count, 2), np.float32)
        wide = scale.astype(np.float32)
        over_rows(_choose_sub_scales, rows, values, weights, steps, wide, subs, refit, *limits, *bounds)
        better = refit[:, 1] < least
        least, best = np.where(better, refit[:, 1], least), np.where(better, scale, best)
        best_subs[better] = subs[better]
        scale = refit[:, 0].astype(np.float16)
    over_rows(_take_codes, rows, values, best.astype(np.float32), best_subs, codes, *limits)
    return Blocks(codes, best, sub_scales=best_subs)


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _sum_up(
    weighed: np.ndarray[Any, Any], tried: np.ndarray[Any, Any], low: float, high: float, sums: np.ndarray[Any, Any]
) -> None:
    """For codes of a step of each sub-block: the sums that the step which suits them, and its loss, follow from.

    Sub-blocks lie side by side and fill the vector units, so that no sum goes across. Three arrays in all: of more, the
    compiler would have to see at run time whether they overlap, and does without vectors.

    Args:
        weighed: ``[weight, 2, sub-block]``: values and what their errors weigh.
        tried: ``[2, sub-block]``: steps, and one over them.
        low, high: of codes.
        sums: ``[3, sub-block]``: of weighed errors times codes, squared codes, and squared errors.
    """
    sums[:] = 0
    for i in range(SUB_BLOCK):
        for sub in range(_SUBS):
            value, weight = weighed[i, 0, sub], weighed[i, 1, sub]
            code = min(max(np.rint(value * tried[1, sub]), low), high)
            error = value - code * tried[0, sub]
            product = weight * code
            sums[0, sub] += product * error
            sums[1, sub] += product * code
            sums[2, sub] += weight * error * error


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_better(tried: np.ndarray[Any, Any], sums: np.ndarray[Any, Any], best: np.ndarray[Any, Any]) -> int:
    """Keep the step that suits the codes where it has less loss; in how many sub-blocks. ``best``: steps and losses."""
    count = 0
    for sub in range(_SUBS):
        squares = sums[1, sub]
        change = sums[0, sub] / squares if squares > 0 else np.float32(0)
        step, loss = tried[0, sub] + change, sums[2, sub] - change * sums[0, sub]
        better = loss < best[1, sub]
        best[0, sub] = step if better else best[0, sub]
        best[1, sub] = loss if better else best[1, sub]
        count += better
    return count


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _fit_sub_blocks(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    low: float,
    high: float,
    candidates: int,
) -> None:
    """The best step of every sub-block by itself, as :func:`~llmconvert.gguf.ggml.fit.best_step` has it."""
    weighed = np.empty((SUB_BLOCK, 2, _SUBS), np.float32)
    tried, best = np.empty((2, _SUBS), np.float32), np.empty((2, _SUBS), np.float32)
    sums = np.empty((3, _SUBS), np.float32)
    extreme = np.empty(_SUBS, np.float32)
    per_row = values.shape[1] // SUPER_BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            for sub in range(_SUBS):
                extreme[sub] = 0
                for i in range(SUB_BLOCK):
                    column = block * SUPER_BLOCK + sub * SUB_BLOCK + i
                    value = values[row, column]
                    weighed[i, 0, sub], weighed[i, 1, sub] = value, importance[column]
                    if abs(value) > abs(extreme[sub]):
                        extreme[sub] = value
                if abs(extreme[sub]) < TINY:
                    extreme[sub] = 0
                best[0, sub], best[1, sub] = 1, np.inf
            for limit in (low, high):
                for candidate in range(candidates):
                    # From one level short of the range's end to a quarter beyond it, where the extreme is clipped.
                    reach = abs(limit) - 1 + candidate * (abs(limit) / 4 + 1) / (candidates - 1)
                    divisor = np.float32(reach if limit > 0 else -reach)
                    for sub in range(_SUBS):
                        tried[0, sub] = extreme[sub] / divisor if extreme[sub] != 0 else np.float32(1)
                        tried[1, sub] = np.float32(1) / tried[0, sub]
                    _sum_up(weighed, tried, low, high, sums)
                    _take_better(tried, sums, best)
            for _ in range(ROUNDS):
                for sub in range(_SUBS):
                    tried[0, sub], tried[1, sub] = best[0, sub], np.float32(1) / best[0, sub]
                _sum_up(weighed, tried, low, high, sums)
                if _take_better(tried, sums, best) == 0:
                    break
            for sub in range(_SUBS):
                steps[row * per_row + block, sub] = best[0, sub] if extreme[sub] != 0 else np.float32(0)


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
    low: float,
    high: float,
    least_sub: Any,
    most_sub: Any,
) -> None:
    """For given scales ``wide``: each sub-block's integer among the nearest three, by error.

    ``refit`` gets the scale that suits the choice, and its loss.
    """
    x = np.empty(SUB_BLOCK, np.float32)
    w = np.empty(SUB_BLOCK, np.float32)
    zero, one = np.float32(0), np.float32(1)
    per_row = values.shape[1] // SUPER_BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            n = row * per_row + block
            scale = wide[n]
            aa = ax = total = zero
            for sub in range(_SUBS):
                start = block * SUPER_BLOCK + sub * SUB_BLOCK
                for i in range(SUB_BLOCK):
                    x[i] = values[row, start + i]
                    w[i] = importance[start + i]
                near = np.rint(steps[n, sub] / scale) if scale != 0 else zero
                best, least = zero, np.float32(np.inf)
                for ds in range(-1, 2):
                    s = min(max(near + np.float32(ds), least_sub), most_sub)
                    step = scale * s
                    inverse = one / step if step != 0 else zero
                    loss = zero
                    for i in range(SUB_BLOCK):
                        error = x[i] - min(max(np.rint(x[i] * inverse), low), high) * step
                        loss += w[i] * error * error
                    if loss < least:
                        best, least = s, loss
                subs[n, sub] = np.int8(best)
                total += least
                step = scale * best
                inverse = one / step if step != 0 else zero
                for i in range(SUB_BLOCK):
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
