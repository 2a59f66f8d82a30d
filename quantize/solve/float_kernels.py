"""The inner loops of quantization to small floats on the CPU, compiled with numba: rounding by bits, search for scales.

As in :mod:`~llmconvert.quantize.solve.kernels`, rows are independent, and every function has a plain torch counterpart.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["best_float_candidates", "nearest_floats"]

# Of float32: the width of its mantissa, its exponent's bias, and what turns the exponent of a power into its inverse's.
_MANTISSA, _BIAS, _INVERSE = 23, 127, 254


# Compiled without leave to reorder: a product with a step and its inverse would else be nothing.
@numba.njit(nogil=True, cache=True, error_model="numpy", inline="never")  # type: ignore[untyped-decorator]
def nearest_floats(
    values: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    scratch: np.ndarray[Any, Any],
    bits: int,
    mantissa: int,
    least: int,
    largest: float,
) -> None:
    """Replace each value by the float next to it, half to even.

    Args:
        values: ``[rows]``, changed.
        codes: int8 ``[rows]``, filled with sign, exponent and mantissa.
        scratch: float32 ``[3, at least rows]``.
        bits, mantissa, least, largest: see :class:`~llmconvert.compute.small_floats.FloatParts`.
    """
    count = len(values)
    value, step, inverse = scratch[0, :count], scratch[1, :count], scratch[2, :count]
    word, step_word, inverse_word = value.view(np.int32), step.view(np.int32), inverse.view(np.int32)
    top, base = np.float32(largest), np.int32(least + _BIAS - mantissa)
    for row in range(count):
        value[row] = min(max(np.float32(values[row]), -top), top)
    for row in range(count):
        step_word[row] = max(((word[row] >> _MANTISSA) & 255) - mantissa, base)
    for row in range(count):
        inverse_word[row] = (_INVERSE - step_word[row]) << _MANTISSA
    sign = 1 << (bits - 1)
    for row in range(count):
        count_of_steps = np.rint(value[row] * inverse[row])
        magnitude = ((step_word[row] - base) << mantissa) + np.int32(abs(count_of_steps))
        codes[row] = np.int8(magnitude + sign * (word[row] < 0))
        value[row] = count_of_steps
    for row in range(count):
        step_word[row] = step_word[row] << _MANTISSA
    for row in range(count):
        values[row] = value[row] * step[row]


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def best_float_candidates(
    begin: int,
    end: int,
    weight: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    best: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    mantissa: int,
    least: int,
    largest: float,
) -> None:
    """For each row and group, the candidate with the least ``Σ importance (w - code · scale)²``.

    Args:
        begin, end: the rows to do.
        weight: ``[rows, groups, group size]``, float32 or float64.
        scales: candidates, ``[rows, groups, candidates]``.
        best: int64 ``[rows, groups]``, filled with candidate indices; the first wins a tie.
        importance: ``[groups, group size]``, non-negative.
        mantissa, least, largest: see :class:`~llmconvert.compute.small_floats.FloatParts`.
    """
    _, groups, size = weight.shape
    value, step, inverse = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    own, share, error = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    word, step_word, inverse_word = value.view(np.int32), step.view(np.int32), inverse.view(np.int32)
    top, base = np.float32(largest), np.int32(least + _BIAS - mantissa)
    for row in range(begin, end):
        for group in range(groups):
            for i in range(size):
                own[i] = weight[row, group, i]
            for i in range(size):
                share[i] = importance[group, i]
            lowest = np.inf
            for candidate in range(scales.shape[2]):
                scale = np.float32(scales[row, group, candidate])
                quotient = np.float32(1) / scale
                for i in range(size):
                    value[i] = min(max(own[i] * quotient, -top), top)
                for i in range(size):
                    exponent = max(((word[i] >> _MANTISSA) & 255) - mantissa, base)
                    step_word[i] = exponent << _MANTISSA
                    inverse_word[i] = (_INVERSE - exponent) << _MANTISSA
                for i in range(size):
                    error[i] = own[i] - np.rint(value[i] * inverse[i]) * step[i] * scale
                loss = _weighted_sum(error, share)
                if loss < lowest:
                    lowest = loss
                    best[row, group] = candidate


@numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")  # type: ignore[untyped-decorator]
def _weighted_sum(error: np.ndarray[Any, Any], share: np.ndarray[Any, Any]) -> Any:
    total = np.float32(0)
    for i in range(len(error)):
        total += share[i] * error[i] * error[i]
    return total
