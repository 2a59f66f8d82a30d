"""The inner loops of quantization on the CPU, compiled with numba: per row, without temporaries, outside the GIL.

Rows are independent, so results do not depend on how many threads share them. Every function has a plain torch
counterpart in the module that calls it, used on other devices and as an oracle in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

__all__ = ["best_candidates", "over_rows", "solve_columns"]

_ROWS_PER_THREAD = 16
# Reordering sums lets the compiler vectorize them; nothing else is relaxed, NaN and infinity keep their meaning.
_FAST = {"reassoc", "contract", "nsz"}


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def best_candidates(
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
        weight: ``[rows, groups, group size]``.
        scales, zeros: candidates, ``[rows, groups, candidates]``.
        best: int64 ``[rows, groups]``, filled with candidate indices; the first wins a tie.
        importance: ``[groups, group size]``, non-negative.
        code_min, code_max: range of codes.
    """
    rows, groups, size = weight.shape
    candidates = scales.shape[2]
    for row in range(rows):
        for group in range(groups):
            values = weight[row, group]
            weights = importance[group]
            least = np.inf
            winner = 0
            for candidate in range(candidates):
                scale = scales[row, group, candidate]
                zero = zeros[row, group, candidate]
                inverse = 1 / scale
                low = code_min - zero
                high = code_max - zero
                loss = weight.dtype.type(0)
                for i in range(size):
                    level = min(max(np.rint(values[i] * inverse), low), high)
                    error = values[i] - level * scale
                    loss += weights[i] * error * error
                if loss < least:
                    least = loss
                    winner = candidate
            best[row, group] = winner


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def solve_columns(
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

    Args:
        weight: ``[rows, columns]``, columns in the order they are solved; changed in place.
        scales, zeros: ``[rows, groups]``, groups in the columns' own order.
        codes: int8 ``[rows, columns]`` in the columns' own order; those of this block are filled.
        errors: ``[rows, block]``, filled with each column's error over its diagonal entry, for the columns beyond.
        order: int64 ``[columns]``, the own place of each column.
        factor: ``[block, block]``, the diagonal block of the upper factor of the inverse Hessian.
        start: first column of the block.
        code_min, code_max: range of codes.
    """
    rows, columns = weight.shape
    block = factor.shape[0]
    size = columns // scales.shape[1]
    line = np.empty(block, weight.dtype)
    for row in range(rows):
        for column in range(block):
            line[column] = weight[row, start + column]
        for column in range(block):
            place = order[start + column]
            group = place // size
            scale = scales[row, group]
            zero = zeros[row, group]
            value = line[column]
            code = min(max(np.rint(value / scale) + zero, code_min), code_max)
            codes[row, place] = np.int8(code)
            error = (value - (code - zero) * scale) / factor[column, column]
            errors[row, column] = error
            for later in range(column + 1, block):
                line[later] -= error * factor[column, later]


def over_rows(
    kernel: Callable[..., None], sliced: Sequence[torch.Tensor], whole: Sequence[torch.Tensor | int | float]
) -> None:
    """Run a kernel over slices of rows in as many threads as torch uses.

    Args:
        kernel: takes the arguments of ``sliced``, then those of ``whole``.
        sliced: CPU tensors with one entry per row in their first dimension.
        whole: what every row needs.
    """
    rows = sliced[0].shape[0]
    threads = max(1, min(torch.get_num_threads(), rows // _ROWS_PER_THREAD))
    bounds = [rows * i // threads for i in range(threads + 1)]
    shared = [value.numpy() if isinstance(value, torch.Tensor) else value for value in whole]

    def part(start: int, stop: int) -> None:
        kernel(*(tensor[start:stop].numpy() for tensor in sliced), *shared)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, bounds[:-1], bounds[1:]))
