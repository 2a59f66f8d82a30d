"""The table of IQ4_NL and IQ4_XS: 16 levels that lie closer to each other around zero, and the search for a step.

A code is an index into the table. As in :mod:`~llmconvert.gguf.ggml.fit`, several steps are tried, each is fitted to
the codes that it gives, and the best then alternates with its codes.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

from llmconvert.gguf.ggml.fit import FAST, LANES, begin_steps, take_step, try_reach

__all__ = ["LEVELS", "fit_level_steps", "nearest_level", "sum_levels"]

#: ``kvalues_iq4nl`` of ggml-common.h, ascending.
LEVELS: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_VALUES = np.array(LEVELS, np.float32)
# Middles between levels are multiples of a half, so the level next to a value follows from its whole number of halves.
_NEAREST = np.array(
    [int(np.searchsorted((_VALUES[1:] + _VALUES[:-1]) / 2, LEVELS[0] + half / 2, "right")) for half in range(481)],
    np.uint8,
)
# The same, as levels.
_LEVEL_AT = _VALUES[_NEAREST]
_ROUNDS = 3
# Steps with which the extreme weight comes to lie from a little inside the last level to well beyond it.
_CANDIDATES = 12
_LOWEST, _HIGHEST = np.float32(LEVELS[0]), np.float32(LEVELS[-1])

Vector = np.ndarray[Any, Any]
Matrix = np.ndarray[Any, Any]
Float = Any


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def nearest_level(value: Float) -> int:
    """The code of the level next to a value, which is a weight over its step."""
    bounded = min(max(value, _LOWEST), _HIGHEST)
    return _NEAREST[np.uint32((bounded - _LOWEST) * np.float32(2))]  # type: ignore[no-any-return]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def sum_levels(x: Matrix, w: Vector, tried: Matrix, sums: Matrix) -> None:
    """For levels of a step of each lane: the sums that the step which suits them, and its loss, follow from.

    Args:
        x: ``[size, lanes]``.
        w: ``[size]``, what errors cost.
        tried: ``[2, lanes]``: steps, and one over them.
        sums: ``[4, lanes]``: of weighed errors times levels, squared levels, squared errors, and levels times values.
    """
    step, inverse = tried[0], tried[1]
    products, squares, losses, values = sums[0], sums[1], sums[2], sums[3]
    level = np.empty(LANES, np.float32)
    sums[:] = 0
    for i in range(len(x)):
        line, weight = x[i], w[i]
        for lane in range(LANES):
            bounded = min(max(line[lane] * inverse[lane], _LOWEST), _HIGHEST)
            level[lane] = _LEVEL_AT[np.uint32((bounded - _LOWEST) * np.float32(2))]
        for lane in range(LANES):
            error = line[lane] - level[lane] * step[lane]
            weighed = weight * level[lane]
            products[lane] += weighed * error
            squares[lane] += weighed * level[lane]
            losses[lane] += weight * error * error
            values[lane] += weighed * line[lane]


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fit_level_steps(begin: int, end: int, values: Matrix, importance: Vector, steps: Matrix) -> None:
    """For each row and group, the step, of either sign, with the least ``Σ w (x - step · level)²``.

    Args:
        begin, end: the rows to do.
        values: ``[rows, columns]``.
        importance: ``[columns]``.
        steps: ``[rows, groups]``, filled.
    """
    groups = steps.shape[1]
    size = values.shape[1] // groups
    x = np.zeros((size, LANES), np.float32)
    tried, best = np.ones((2, LANES), np.float32), np.ones((2, LANES), np.float32)
    sums, extreme = np.zeros((4, LANES), np.float32), np.zeros(LANES, np.float32)
    for first in range(begin, end, LANES):
        height = min(LANES, end - first)
        for group in range(groups):
            begin_steps(values, first, height, group * size, x, extreme, best)
            w = importance[group * size : (group + 1) * size]
            for limit in (_LOWEST, _HIGHEST):
                for candidate in range(_CANDIDATES):
                    reach = limit * (np.float32(0.75) + np.float32(candidate) * np.float32(0.05))
                    try_reach(extreme, reach, tried)
                    sum_levels(x, w, tried, sums)
                    take_step(tried, sums, best)
            for _ in range(_ROUNDS):
                for lane in range(LANES):
                    tried[0, lane] = best[0, lane] if best[0, lane] != 0 else np.float32(1)
                    tried[1, lane] = np.float32(1) / tried[0, lane]
                sum_levels(x, w, tried, sums)
                take_step(tried, sums, best)
            for lane in range(height):
                steps[first + lane, group] = best[0, lane] if extreme[lane] != 0 else np.float32(0)
