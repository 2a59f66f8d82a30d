"""The inner loops of quantization on the CPU, compiled with numba: per row, without temporaries, outside the GIL.

Rows are independent, so results do not depend on how many threads share them. Every function has a plain torch
counterpart in the module that calls it, used on other devices and as an oracle in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

__all__ = ["best_candidates", "over_rows", "solve_columns"]

_ROWS_PER_THREAD = 64
# Rows computed side by side: two vectors of 16 floats in the search; in the solver as many as fit the first-level
# cache with 128 columns.
_LANES = 32
_TILE_ROWS = 64
# Columns whose errors are passed on together; the kernel spells them out.
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
    code_min: float,
    code_max: float,
) -> None:
    """For each row and group, the candidate with the least ``Σ importance (w - (code - zero) scale)²``.

    Args:
        begin, end: the rows to do.
        weight: ``[rows, groups, group size]``.
        scales, zeros: candidates, ``[rows, groups, candidates]``.
        best: int64 ``[rows, groups]``, filled with candidate indices; the first wins a tie.
        importance: ``[groups, group size]``, non-negative.
        code_min, code_max: range of codes.
    """
    _, groups, size = weight.shape
    candidates = scales.shape[2]
    # Rows side by side through the vector units; lanes beyond the last row compute on zeros, and nobody looks.
    values = np.zeros((size, _LANES), weight.dtype)
    step = np.ones(_LANES, weight.dtype)
    inverse = np.ones(_LANES, weight.dtype)
    low = np.zeros(_LANES, weight.dtype)
    high = np.zeros(_LANES, weight.dtype)
    loss = np.empty(_LANES, weight.dtype)
    least = np.empty(_LANES, weight.dtype)
    for top in range(begin, end, _LANES):
        height = min(_LANES, end - top)
        for group in range(groups):
            for lane in range(height):
                for i in range(size):
                    values[i, lane] = weight[top + lane, group, i]
            least[:] = np.inf
            for candidate in range(candidates):
                for lane in range(height):
                    step[lane] = scales[top + lane, group, candidate]
                    inverse[lane] = 1 / step[lane]
                    low[lane] = code_min - zeros[top + lane, group, candidate]
                    high[lane] = code_max - zeros[top + lane, group, candidate]
                loss[:] = 0
                for i in range(size):
                    weighting = importance[group, i]
                    value = values[i]
                    for lane in range(_LANES):
                        level = min(max(np.rint(value[lane] * inverse[lane]), low[lane]), high[lane])
                        error = value[lane] - level * step[lane]
                        loss[lane] += weighting * error * error
                for lane in range(height):
                    if loss[lane] < least[lane]:
                        least[lane] = loss[lane]
                        best[top + lane, group] = candidate


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def solve_columns(
    begin: int,
    end: int,
    weight: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    zeros: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    errors: np.ndarray[Any, Any],
    order: np.ndarray[Any, Any],
    factor: np.ndarray[Any, Any],
    start: int,
    code_min: float,
    code_max: float,
) -> None:
    """Quantize a block of columns one after the other, each error spread over the columns after it in the block.

    Everything is transposed: a column depends on all before it, rows on nothing, so rows lie side by side in memory
    and go through the vector units together.

    Args:
        begin, end: the rows to do.
        weight: ``[columns, rows]``, columns in the order they are solved; only read.
        scales, zeros: ``[groups, rows]``, groups in the columns' own order.
        codes: int8 ``[columns, rows]`` in the columns' own order; those of this block are filled.
        errors: ``[block, rows]``, filled with each column's error over its diagonal entry, for the columns beyond.
        order: int64 ``[columns]``, the own place of each column.
        factor: ``[block, block]``, the diagonal block of the upper factor of the inverse Hessian.
        start: first column of the block.
        code_min, code_max: range of codes.
    """
    block = factor.shape[0]
    size = weight.shape[0] // scales.shape[0]
    tile = np.zeros((block, _TILE_ROWS), weight.dtype)
    error = np.zeros((_PANEL, _TILE_ROWS), weight.dtype)
    for top in range(begin, end, _TILE_ROWS):
        height = min(_TILE_ROWS, end - top)
        for column in range(block):
            for row in range(height):
                tile[column, row] = weight[start + column, top + row]
        for panel in range(0, block, _PANEL):
            after = min(panel + _PANEL, block)
            for column in range(panel, after):
                place = order[start + column]
                group = place // size
                pivot = factor[column, column]
                k = column - panel
                for row in range(height):
                    value, step, origin = tile[column, row], scales[group, top + row], zeros[group, top + row]
                    code = min(max(np.rint(value / step) + origin, code_min), code_max)
                    error[k, row] = (value - (code - origin) * step) / pivot
                    codes[place, top + row] = np.int8(code)
                    errors[column, top + row] = error[k, row]
                for later in range(column + 1, after):
                    share = factor[column, later]
                    for row in range(height):
                        tile[later, row] -= error[k, row] * share
            # A short last panel has nothing after it. The others pass their four errors on together, which loads and
            # stores every later value once instead of four times.
            for later in range(after, block):
                s0, s1 = factor[panel, later], factor[panel + 1, later]
                s2, s3 = factor[panel + 2, later], factor[panel + 3, later]
                for row in range(height):
                    tile[later, row] -= (
                        error[0, row] * s0 + error[1, row] * s1 + error[2, row] * s2 + error[3, row] * s3
                    )


def over_rows(
    kernel: Callable[..., None], rows: int, *arguments: torch.Tensor | np.ndarray[Any, Any] | np.generic | int | float
) -> None:
    """Run ``kernel(begin, end, *arguments)`` over all rows, in as many threads as torch uses; tensors go as arrays."""
    threads = max(1, min(torch.get_num_threads(), rows // _ROWS_PER_THREAD))
    bounds = [rows * i // threads for i in range(threads + 1)]
    arrays = [value.numpy() if isinstance(value, torch.Tensor) else value for value in arguments]

    if threads == 1:
        kernel(0, rows, *arrays)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        others = [pool.submit(kernel, bounds[i], bounds[i + 1], *arrays) for i in range(1, threads)]
        kernel(bounds[0], bounds[1], *arrays)
        for other in others:
            other.result()
