"""The inner loops of quantization on the CPU, compiled with numba: per row, without temporaries, outside the GIL.

Rows are independent, so results do not depend on how many threads share them. Every function has a plain torch
counterpart in the module that calls it, used on other devices and as an oracle in the tests; for GPUs, the loops over
columns are in Triton too (:func:`gpu_kernels`).
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import numba
import numpy as np
import torch

__all__ = [
    "best_candidates",
    "descend_columns",
    "gpu_kernels",
    "load_kernels",
    "solve_columns",
    "transpose_in_order",
    "weighted_squares",
]

# Rows computed side by side: two vectors of 16 floats in the search; in the solver as many as fit the first-level
# cache with 128 columns.
_LANES = 32
_TILE_ROWS = 128
# Columns whose errors are passed on, and values that are tried, together; the kernels spell them out.
_PANEL = 4
# Reordering sums lets the compiler vectorize them; nothing else is relaxed, NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def best_candidates(
    begin: int,
    end: int,
    weight: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    zeros: np.ndarray[Any, Any],
    best: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    stride: int,
    code_min: float,
    code_max: float,
) -> None:
    """For each row and group, the candidate with the least ``Σ importance (w - (code - zero) scale)²``.

    With a ``stride`` above one only every so many candidates are tried, and then those around the best of them.

    Args:
        begin, end: the rows to do.
        weight: ``[rows, groups, group size]``.
        scales, zeros: candidates, ``[rows, groups, candidates]``.
        best: int64 ``[rows, groups]``, filled with candidate indices; the first wins a tie.
        importance: ``[groups, group size]``, non-negative.
        stride: one to try every candidate.
        code_min, code_max: range of codes.
    """
    _, groups, size = weight.shape
    candidates = scales.shape[2]
    # Rows side by side through the vector units; lanes beyond the last row compute on zeros, and nobody looks.
    # The same for columns, whose number is rounded up: they count nothing.
    values = np.zeros(((size + _PANEL - 1) // _PANEL * _PANEL, _LANES), weight.dtype)
    share = np.zeros(len(values), weight.dtype)
    one, lowest, highest = weight.dtype.type(1), weight.dtype.type(code_min), weight.dtype.type(code_max)
    step = np.ones(_LANES, weight.dtype)
    origin = np.zeros(_LANES, weight.dtype)
    inverse = np.ones(_LANES, weight.dtype)
    low = np.zeros(_LANES, weight.dtype)
    high = np.zeros(_LANES, weight.dtype)
    loss = np.empty(_LANES, weight.dtype)
    least = np.empty(_LANES, weight.dtype)
    candidate = np.zeros(_LANES, np.int64)
    centre = np.zeros(_LANES, np.int64)
    for top in range(begin, end, _LANES):
        height = min(_LANES, end - top)
        for group in range(groups):
            for lane in range(height):
                for i in range(size):
                    values[i, lane] = weight[top + lane, group, i]
            share[:size] = importance[group]
            least[:] = np.inf
            coarse = (candidates + stride - 1) // stride
            for attempt in range(coarse + 2 * (stride - 1)):
                # After the coarse ones: stride - 1 below each row's best of them, and as many above.
                offset = attempt - coarse - (stride - 1)
                offset += offset >= 0
                if attempt == coarse:
                    centre[:height] = best[top : top + height, group]
                for lane in range(height):
                    tried = attempt * stride if attempt < coarse else centre[lane] + offset
                    index = min(max(tried, 0), candidates - 1)
                    candidate[lane] = index
                    step[lane] = scales[top + lane, group, index]
                    origin[lane] = zeros[top + lane, group, index]
                for lane in range(_LANES):
                    inverse[lane] = one / step[lane]
                for lane in range(_LANES):
                    low[lane] = lowest - origin[lane]
                for lane in range(_LANES):
                    high[lane] = highest - origin[lane]
                loss[:] = 0
                # Four values to each loading and storing of the sums.
                for i in range(0, len(values), _PANEL):
                    v0, v1, v2, v3 = values[i], values[i + 1], values[i + 2], values[i + 3]
                    s0, s1, s2, s3 = share[i], share[i + 1], share[i + 2], share[i + 3]
                    for lane in range(_LANES):
                        e0 = v0[lane] - min(max(np.rint(v0[lane] * inverse[lane]), low[lane]), high[lane]) * step[lane]
                        e1 = v1[lane] - min(max(np.rint(v1[lane] * inverse[lane]), low[lane]), high[lane]) * step[lane]
                        e2 = v2[lane] - min(max(np.rint(v2[lane] * inverse[lane]), low[lane]), high[lane]) * step[lane]
                        e3 = v3[lane] - min(max(np.rint(v3[lane] * inverse[lane]), low[lane]), high[lane]) * step[lane]
                        loss[lane] += s0 * e0 * e0 + s1 * e1 * e1 + s2 * e2 * e2 + s3 * e3 * e3
                for lane in range(height):
                    if loss[lane] < least[lane]:
                        least[lane] = loss[lane]
                        best[top + lane, group] = candidate[lane]


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def weighted_squares(
    begin: int,
    end: int,
    weight: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    zeros: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    sums: np.ndarray[Any, Any],
) -> None:
    """For each row, ``Σ importance (w - (code - zero) scale)²``.

    Args:
        begin, end: the rows to do.
        weight: ``[rows, columns]``.
        codes: int8 ``[rows, columns]``.
        scales, zeros: ``[rows, groups]``.
        importance: ``[columns]``.
        sums: ``[rows]``, filled.
    """
    groups = scales.shape[1]
    size = weight.shape[1] // groups
    for row in range(begin, end):
        total = weight.dtype.type(0)
        for group in range(groups):
            step, origin = scales[row, group], zeros[row, group]
            for i in range(group * size, (group + 1) * size):
                error = weight[row, i] - (codes[row, i] - origin) * step
                total += importance[i] * error * error
        sums[row] = total


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
        codes: int8 ``[columns, rows]`` in the columns' own order; those of this block are filled.
        loss: ``[rows]``, to which this block's part of the form is added.
        order: int64 ``[columns]``, the own place of each column.
        added: ``[columns]``, in their own order, what of the Hessian's diagonal is damping; not part of the loss.
        factor: ``[block, block]``, the diagonal block of the Hessian's lower factor.
        start: first column of the block.
        code_min, code_max: range of codes.
    """
    block = factor.shape[0]
    size = errors.shape[0] // scales.shape[0]
    tile = np.zeros((block, _TILE_ROWS), errors.dtype)
    error = np.zeros((_PANEL, _TILE_ROWS), errors.dtype)
    level = np.zeros(_TILE_ROWS, errors.dtype)
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
                for row in range(height):
                    level[row] = min(max(np.rint(line[row] / step[row]) + origin[row], lowest), highest)
                stored = codes[place, top:bottom]
                for row in range(height):
                    stored[row] = np.int8(level[row])
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
) -> None:
    """Give every column the code that is best for the others, one after the other.

    Args:
        begin, end: the rows to do.
        gradient: ``[columns, rows]``, kept up to date.
        hessian: ``[columns, columns]``.
        codes: int8 ``[columns, rows]``, changed.
        scale: ``[rows]``.
        moved: ``[columns, rows]``, filled with the changes of the weights.
        code_min, code_max: range of codes.
    """
    count = len(hessian)
    tile = np.zeros((count, _TILE_ROWS), gradient.dtype)
    level = np.zeros(_TILE_ROWS, gradient.dtype)
    best = np.zeros(_TILE_ROWS, gradient.dtype)
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
            for row in range(height):
                level[row] = stored[row]
            for row in range(height):
                best[row] = min(max(np.rint(level[row] - line[row] * inverse / step[row]), lowest), highest)
            for row in range(height):
                stored[row] = np.int8(best[row])
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


def gpu_kernels(values: torch.Tensor) -> ModuleType | None:
    """:mod:`~llmconvert.quantize.solve.triton_kernels`, if ``values`` are float32 on a GPU and Triton is installed."""
    return _triton_kernels() if values.is_cuda and values.dtype == torch.float32 else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    try:
        from llmconvert.quantize.solve import triton_kernels
    except ImportError:  # torch brings Triton along where there are GPUs for it
        return None
    return triton_kernels


def load_kernels() -> None:
    """Load the kernels for float32, or compile them where no earlier process has, so that no linear waits for it."""
    one, line = np.ones((1, 1), np.float32), np.ones(1, np.float32)
    codes, index = np.zeros((1, 1), np.int8), np.zeros(1, np.int64)
    best_candidates(0, 0, one[None], one[None], one[None], index[None], one, 1, 0.0, 0.0)
    transpose_in_order(0, 0, one, index, one)
    solve_columns(0, 0, one, one, one, one, codes, line, index, line, one, 0, 0.0, 0.0)
    weighted_squares(0, 0, one, codes, one, one, line, line)
    descend_columns(0, 0, one, one, codes, line, one, 0.0, 0.0)
