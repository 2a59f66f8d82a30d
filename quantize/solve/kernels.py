"""The loops over columns of quantization on the CPU, compiled with numba: without temporaries, outside the GIL.

Rows are independent, so results do not depend on how many threads share them. Every function has a plain torch
counterpart in the module that calls it, used on other devices and as an oracle in the tests; for GPUs, the loops over
columns are in Triton too (:func:`~llmconvert.quantize.solve.loops.gpu_kernels`).

Compiled loops are imported where they are called: numba takes a sixth of a second to load, and plans call none.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.quantize.solve.float_kernels import best_float_candidates, nearest_floats
from llmconvert.quantize.solve.search_kernels import affine_sums, best_candidates, weighted_squares

__all__ = [
    "descend_columns",
    "load_kernels",
    "solve_columns",
    "transpose_in_order",
]

# Rows computed side by side: as many as fit the first-level cache with 128 columns; and those laid down together.
_LANES = 32
_TILE_ROWS = 128
# Columns whose errors are passed on, and values that are tried, together; the kernels spell them out.
_PANEL = 4
# Reordering sums lets the compiler vectorize them; nothing else is relaxed, NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def transpose_in_order(
    begin: int,
    end: int,
    weight: np.ndarray[Any, Any],
    order: np.ndarray[Any, Any],
    transposed: np.ndarray[Any, Any],
) -> None:
    """Lay the columns of a weight down as rows, in a given order.

    Args:
        begin, end: the rows to do.
        weight: ``[rows, columns]``.
        order: int64 ``[columns]``, which column comes first, second, …
        transposed: ``[columns, rows]``, filled.
    """
    for top in range(begin, end, _LANES):
        bottom = min(top + _LANES, end)
        part = weight[top:bottom]
        for column in range(len(order)):
            place, line = order[column], transposed[column, top:bottom]
            for row in range(bottom - top):
                line[row] = part[row, place]


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _nearest_levels(
    values: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    levels: np.ndarray[Any, Any],
    counts: np.ndarray[Any, Any],
) -> None:
    """Replace each value by the level next to it; of two as near the lower one.

    Args:
        values: ``[rows]``.
        codes: int8 ``[rows]``, filled with the levels' indices.
        levels: ascending.
        counts: int32 ``[at least rows]``, to work in.
    """
    height = len(values)
    for row in range(height):
        counts[row] = 0
    for index in range(len(levels) - 1):
        middle = (levels[index] + levels[index + 1]) / 2
        for row in range(height):
            counts[row] += values[row] > middle
    for row in range(height):
        codes[row] = np.int8(counts[row])
    for row in range(height):
        values[row] = levels[counts[row]]


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def solve_columns(
    begin: int,
    end: int,
    errors: np.ndarray[Any, Any],
    carried: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    zeros: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    loss: np.ndarray[Any, Any],
    order: np.ndarray[Any, Any],
    added: np.ndarray[Any, Any],
    factor: np.ndarray[Any, Any],
    start: int,
    code_min: float,
    code_max: float,
    levels: np.ndarray[Any, Any],
    bits: int,
    mantissa: int,
    least: int,
) -> None:
    """Quantize a block of columns, the last one first, each answering the errors of all that were solved before it.

    Everything is transposed: a column depends on all behind it, rows on nothing, so rows lie side by side in memory
    and go through the vector units together.

    Args:
        begin, end: the rows to do.
        errors: ``[columns, rows]``, columns in the factor's order. The weights of this block, which their errors
            ``w - ŵ`` take the place of.
        carried: ``[block, rows]``, sums of the errors of the columns behind this block, each times its entry of the
            factor.
        scales, zeros: ``[groups, rows]``, groups in the columns' own order.
        codes: int8 ``[columns, rows]`` in the columns' own order; those of this block are filled. Codes above 127 are
            the bytes of unsigned ones.
        loss: ``[rows]``, to which this block's part of the form is added.
        order: int64 ``[columns]``, the own place of each column.
        added: ``[columns]``, in their own order, what of the Hessian's diagonal is damping; not part of the loss.
        factor: ``[block, block]``, the diagonal block of the Hessian's lower factor.
        start: first column of the block.
        code_min, code_max: range of codes.
        levels: what codes stand for; empty where they stand for themselves. Unless they are floats, they ascend.
        bits, mantissa, least: of floats (:class:`~llmconvert.compute.small_floats.FloatParts`); all zero for others.
    """
    block = factor.shape[0]
    size = errors.shape[0] // scales.shape[0]
    tile = np.zeros((block, _TILE_ROWS), errors.dtype)
    error = np.zeros((_PANEL, _TILE_ROWS), errors.dtype)
    level = np.zeros(_TILE_ROWS, errors.dtype)
    counts = np.zeros(_TILE_ROWS, np.int32)
    scratch = np.zeros((3, _TILE_ROWS), np.float32)
    lowest, highest = errors.dtype.type(code_min), errors.dtype.type(code_max)
    # Lines are taken out of their matrices first: in an index that is a sum the compiler must allow for a negative one,
    # and gives up on vectors. For the same reason no loop touches more than four of them: any two could overlap.
    for top in range(begin, end, _TILE_ROWS):
        bottom = min(top + _TILE_ROWS, end)
        height = bottom - top
        for column in range(block):
            line, source = tile[column], carried[column, top:bottom]
            for row in range(height):
                line[row] = source[row]
        for panel in range(block, 0, -_PANEL):
            first = max(panel - _PANEL, 0)
            for column in range(panel - 1, first - 1, -1):
                place = order[start + column]
                line, wrong, value = tile[column], error[panel - 1 - column], errors[start + column, top:bottom]
                step, origin = scales[place // size, top:bottom], zeros[place // size, top:bottom]
                pivot, damping = factor[column, column], added[place]
                inverse = 1 / pivot
                for row in range(height):
                    line[row] = line[row] * inverse + value[row]
                stored = codes[place, top:bottom]
                if len(levels) == 0:
                    for row in range(height):
                        level[row] = min(max(np.rint(line[row] / step[row]) + origin[row], lowest), highest)
                    for row in range(height):
                        stored[row] = np.int32(level[row])
                else:
                    for row in range(height):
                        level[row] = line[row] / step[row]
                    if mantissa > 0:
                        nearest_floats(level[:height], stored, scratch, bits, mantissa, least, code_max)
                    else:
                        _nearest_levels(level[:height], stored, levels, counts)
                for row in range(height):
                    level[row] = (level[row] - origin[row]) * step[row]
                for row in range(height):
                    wrong[row] = value[row] - level[row]
                for row in range(height):
                    level[row] = (line[row] - level[row]) * pivot
                total = loss[top:bottom]
                for row in range(height):
                    total[row] += level[row] * level[row] - damping * wrong[row] * wrong[row]
                for row in range(height):
                    value[row] = wrong[row]
                for later in range(first, column):
                    line, share = tile[later], factor[column, later]
                    for row in range(height):
                        line[row] += wrong[row] * share
            # A short last panel has nothing after it. The others pass their four errors on together, which loads and
            # stores every later value once instead of four times.
            e0, e1, e2, e3 = error[0], error[1], error[2], error[3]
            for later in range(first):
                line = tile[later]
                s0, s1 = factor[panel - 1, later], factor[panel - 2, later]
                s2, s3 = factor[panel - 3, later], factor[panel - 4, later]
                for row in range(height):
                    line[row] += e0[row] * s0 + e1[row] * s1 + e2[row] * s2 + e3[row] * s3


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def descend_columns(
    begin: int,
    end: int,
    gradient: np.ndarray[Any, Any],
    hessian: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    moved: np.ndarray[Any, Any],
    code_min: float,
    code_max: float,
    levels: np.ndarray[Any, Any],
    bits: int,
    mantissa: int,
    least: int,
) -> None:
    """Give every column the code that is best for the others, one after the other.

    Args:
        begin, end: the rows to do.
        gradient: ``[columns, rows]``, kept up to date.
        hessian: ``[columns, columns]``.
        codes: int8 ``[columns, rows]``, changed; see :func:`solve_columns`.
        scale: ``[rows]``.
        moved: ``[columns, rows]``, filled with the changes of the weights.
        code_min, code_max: range of codes.
        levels, bits, mantissa, least: see :func:`solve_columns`.
    """
    count = len(hessian)
    tile = np.zeros((count, _TILE_ROWS), gradient.dtype)
    level = np.zeros(_TILE_ROWS, gradient.dtype)
    best = np.zeros(_TILE_ROWS, gradient.dtype)
    counts = np.zeros(_TILE_ROWS, np.int32)
    scratch = np.zeros((3, _TILE_ROWS), np.float32)
    lowest, highest = gradient.dtype.type(code_min), gradient.dtype.type(code_max)
    # Lines in matrices of their own, and few to a loop, for the sake of the vector units; see above.
    for top in range(begin, end, _TILE_ROWS):
        bottom = min(top + _TILE_ROWS, end)
        height = bottom - top
        step = scale[top:bottom]
        for column in range(count):
            line, source = tile[column], gradient[column, top:bottom]
            for row in range(height):
                line[row] = source[row]
        for column in range(count):
            line, stored, change = tile[column], codes[column, top:bottom], moved[column, top:bottom]
            inverse = 1 / hessian[column, column]
            if len(levels) == 0:
                if highest > 127:
                    for row in range(height):
                        level[row] = np.int32(stored[row]) & 255
                else:
                    for row in range(height):
                        level[row] = stored[row]
                for row in range(height):
                    best[row] = min(max(np.rint(level[row] - line[row] * inverse / step[row]), lowest), highest)
                for row in range(height):
                    stored[row] = np.int32(best[row])
            else:
                for row in range(height):
                    level[row] = levels[stored[row] & 255]
                for row in range(height):
                    best[row] = level[row] - line[row] * inverse / step[row]
                if mantissa > 0:
                    nearest_floats(best[:height], stored, scratch, bits, mantissa, least, code_max)
                else:
                    _nearest_levels(best[:height], stored, levels, counts)
            for row in range(height):
                level[row] = (best[row] - level[row]) * step[row]
            for row in range(height):
                change[row] = level[row]
            for other in range(count):
                line, share = tile[other], hessian[other, column]
                for row in range(height):
                    line[row] += level[row] * share
        for column in range(count):
            line, target = tile[column], gradient[column, top:bottom]
            for row in range(height):
                target[row] = line[row]


def load_kernels() -> None:
    """Load the kernels for float32, or compile them where no earlier process has, so that no linear waits for it."""
    one, line = np.ones((1, 1), np.float32), np.ones(1, np.float32)
    codes, index = np.zeros((1, 1), np.int8), np.zeros(1, np.int64)
    best_candidates(0, 0, one[None], one[None], one[None], index[None], one, 1, 0.0, 0.0)
    transpose_in_order(0, 0, one, index, one)
    solve_columns(0, 0, one, one, one, one, codes, line, index, line, one, 0, 0.0, 0.0, line[:0], 0, 0, 0)
    weighted_squares(0, 0, one, codes, one, one, line, line)
    affine_sums(0, 0, one[None], one, one, one, one[None], 0.0)
    descend_columns(0, 0, one, one, codes, line, one, 0.0, 0.0, line[:0], 0, 0, 0)
    best_float_candidates(0, 0, one[None], one[None], index[None], one, 1, 0, 1.0)
