"""The inner loops of a search for scales on the CPU, compiled with numba: per row, without temporaries.

As in :mod:`~llmconvert.quantize.solve.kernels`, rows are independent, and every function has a plain torch counterpart.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["affine_sums", "best_candidates", "weighted_squares"]

# Rows computed side by side: two vectors of 16 floats.
_LANES = 32
# Values that are tried together; the kernels spell them out.
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


@numba.njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def affine_sums(
    begin: int,
    end: int,
    weight: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    biases: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    sums: np.ndarray[Any, Any],
    code_max: float,
) -> None:
    """For each row and group, what the codes ``q`` next to the weights ``w`` come to under a scale and a bias.

    Args:
        begin, end: the rows to do.
        weight: ``[rows, groups, group size]``.
        scales, biases: ``[rows, groups]``.
        importance: ``[groups, group size]``, what a squared error costs.
        sums: ``[rows, groups, 4]``, filled with the squared error, and the sums of ``q``, ``q²`` and ``q w``, each
            weighted with the importance.
        code_max: the largest code; the least is zero.
    """
    _, groups, size = weight.shape
    zero, highest, one = weight.dtype.type(0), weight.dtype.type(code_max), weight.dtype.type(1)
    for row in range(begin, end):
        for group in range(groups):
            values, share = weight[row, group], importance[group]
            step, start = scales[row, group], biases[row, group]
            inverse = one / step
            loss, linear, square, product = zero, zero, zero, zero
            for i in range(size):
                code = min(max(np.rint((values[i] - start) * inverse), zero), highest)
                error = values[i] - (code * step + start)
                weighted = share[i] * code
                loss += share[i] * error * error
                linear += weighted
                square += weighted * code
                product += weighted * values[i]
            sums[row, group, 0] = loss
            sums[row, group, 1] = linear
            sums[row, group, 2] = square
            sums[row, group, 3] = product
