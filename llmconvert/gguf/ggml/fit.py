"""Scales and minima of groups of weights by (weighted) least squares, compiled with numba.

A scale decides the codes, and codes decide the scale that suits them best. So several scales are tried; for each, the
codes are taken and the scale fitted to them in closed form; the best fit then alternates between the two a few times.
Residuals rather than values are fitted: the differences between candidates would drown in float32 sums of squares.

Rows lie side by side, so that they fill the vector units, no sum goes across, and a column's importance is one number
for all of them. Four weights go into each loading and storing of the sums.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = [
    "CANDIDATES",
    "FAST",
    "LANES",
    "begin_steps",
    "fit_affine",
    "fit_steps",
    "take_lanes",
    "take_step",
    "try_reach",
]

# Reordering sums lets the compiler vectorize them; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz"}
#: Steps tried where the choice matters most, below 6 bits.
CANDIDATES = 20
# How often codes and steps are then fitted to each other.
_ROUNDS = 3
# Below that a group is zero.
_TINY = np.float32(1e-30)
#: Rows that are computed side by side: four vectors of 16 floats.
LANES = 64

# float32 throughout: one float64 among them would halve the vector units.
Vector = np.ndarray[Any, Any]
Matrix = np.ndarray[Any, Any]
Float = Any


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def take_lanes(values: Matrix, first: int, height: int, start: int, lanes: Matrix) -> None:
    """Columns from ``start`` on of ``height`` rows from ``first`` on, as ``lanes[column, row]``.

    They are a multiple of eight. Lanes beyond ``height`` stay.
    """
    # Eight lines at a time: as many as go through a row's cache line before it is lost to the next rows'.
    for i in range(0, len(lanes), 8):
        l0, l1, l2, l3 = lanes[i], lanes[i + 1], lanes[i + 2], lanes[i + 3]
        l4, l5, l6, l7 = lanes[i + 4], lanes[i + 5], lanes[i + 6], lanes[i + 7]
        for lane in range(height):
            row = values[first + lane, start + i : start + i + 8]
            l0[lane], l1[lane], l2[lane], l3[lane] = row[0], row[1], row[2], row[3]
            l4[lane], l5[lane], l6[lane], l7[lane] = row[4], row[5], row[6], row[7]


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _largest_of(x: Matrix, extreme: Vector) -> None:
    """The value of largest magnitude of every lane; zero where it is next to it."""
    extreme[:] = 0
    for i in range(len(x)):
        line = x[i]
        for lane in range(LANES):
            extreme[lane] = line[lane] if abs(line[lane]) > abs(extreme[lane]) else extreme[lane]
    for lane in range(LANES):
        extreme[lane] = extreme[lane] if abs(extreme[lane]) >= _TINY else np.float32(0)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def begin_steps(values: Matrix, first: int, height: int, start: int, x: Matrix, extreme: Vector, best: Matrix) -> None:
    """Take a group's weights into the lanes, find their extremes, and have no best step yet."""
    take_lanes(values, first, height, start, x)
    _largest_of(x, extreme)
    best[0], best[1] = np.float32(1), np.float32(np.inf)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def try_reach(extreme: Vector, reach: Float, tried: Matrix) -> None:
    """The step by which the extreme of every lane comes to lie at ``reach``; ``tried``: steps, and one over them."""
    for lane in range(LANES):
        tried[0, lane] = extreme[lane] / reach if extreme[lane] != 0 else np.float32(1)
        tried[1, lane] = np.float32(1) / tried[0, lane]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _sum_step(x: Matrix, w: Vector, tried: Matrix, sums: Matrix, low: Float, high: Float) -> None:
    """For codes of a step of each lane: the sums that the step which suits them, and its loss, follow from.

    Args:
        x: ``[size, lanes]``; ``size`` is a multiple of four.
        w: ``[size]``, what errors cost.
        tried: ``[2, lanes]``: steps, and one over them.
        sums: ``[3, lanes]``: of weighed errors times codes, squared codes, and squared errors.
        low, high: of codes.
    """
    step, inverse = tried[0], tried[1]
    products, squares, losses = sums[0], sums[1], sums[2]
    sums[:] = 0
    for i in range(0, len(x), 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for lane in range(LANES):
            c0 = min(max(np.rint(x0[lane] * inverse[lane]), low), high)
            c1 = min(max(np.rint(x1[lane] * inverse[lane]), low), high)
            c2 = min(max(np.rint(x2[lane] * inverse[lane]), low), high)
            c3 = min(max(np.rint(x3[lane] * inverse[lane]), low), high)
            e0, e1 = x0[lane] - c0 * step[lane], x1[lane] - c1 * step[lane]
            e2, e3 = x2[lane] - c2 * step[lane], x3[lane] - c3 * step[lane]
            p0, p1, p2, p3 = w0 * c0, w1 * c1, w2 * c2, w3 * c3
            products[lane] += p0 * e0 + p1 * e1 + p2 * e2 + p3 * e3
            squares[lane] += p0 * c0 + p1 * c1 + p2 * c2 + p3 * c3
            losses[lane] += w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def take_step(tried: Matrix, sums: Matrix, best: Matrix) -> None:
    """Keep the step that suits the codes where it has less loss; ``best``: steps and losses."""
    for lane in range(LANES):
        squares = sums[1, lane]
        change = sums[0, lane] / squares if squares > 0 else np.float32(0)
        step, loss = tried[0, lane] + change, sums[2, lane] - change * sums[0, lane]
        better = loss < best[1, lane]
        best[0, lane] = step if better else best[0, lane]
        best[1, lane] = loss if better else best[1, lane]


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fit_steps(
    begin: int,
    end: int,
    values: Matrix,
    importance: Vector,
    steps: Matrix,
    low: float,
    high: float,
    candidates: int,
) -> None:
    """For each row and group, the step, of either sign, with the least ``Σ w (x - step · code)²``.

    Args:
        begin, end: the rows to do.
        values: ``[rows, columns]``.
        importance: ``[columns]``.
        steps: ``[rows, groups]``, filled.
        low, high: of codes.
        candidates: steps tried for each sign, at least two.
    """
    groups = steps.shape[1]
    size = values.shape[1] // groups
    x = np.zeros((size, LANES), np.float32)
    tried, best = np.ones((2, LANES), np.float32), np.ones((2, LANES), np.float32)
    sums = np.zeros((3, LANES), np.float32)
    extreme = np.zeros(LANES, np.float32)
    for first in range(begin, end, LANES):
        height = min(LANES, end - first)
        for group in range(groups):
            begin_steps(values, first, height, group * size, x, extreme, best)
            w = importance[group * size : (group + 1) * size]
            for limit in (low, high):
                for candidate in range(candidates):
                    # From one level short of the range's end to a quarter beyond it, where the extreme is clipped.
                    reach = abs(limit) - 1 + candidate * (abs(limit) / 4 + 1) / (candidates - 1)
                    try_reach(extreme, np.float32(reach if limit > 0 else -reach), tried)
                    _sum_step(x, w, tried, sums, low, high)
                    take_step(tried, sums, best)
            for _ in range(_ROUNDS):
                for lane in range(LANES):
                    tried[0, lane], tried[1, lane] = best[0, lane], np.float32(1) / best[0, lane]
                _sum_step(x, w, tried, sums, low, high)
                take_step(tried, sums, best)
            for lane in range(height):
                steps[first + lane, group] = best[0, lane] if extreme[lane] != 0 else np.float32(0)


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _sum_affine(x: Matrix, w: Vector, tried: Matrix, sums: Matrix, high: Float) -> None:
    """As :func:`_sum_step`, for codes from zero on above a minimum.

    Args:
        x, w, high: see there.
        tried: ``[3, lanes]``: steps, one over them, and minima.
        sums: ``[5, lanes]``: of weighed codes, squared codes, errors times codes, errors, and squared errors.
    """
    step, inverse, minimum = tried[0], tried[1], tried[2]
    ones, squares, products, errors, losses = sums[0], sums[1], sums[2], sums[3], sums[4]
    zero = np.float32(0)
    sums[:] = 0
    for i in range(0, len(x), 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for lane in range(LANES):
            a0, a1 = x0[lane] - minimum[lane], x1[lane] - minimum[lane]
            a2, a3 = x2[lane] - minimum[lane], x3[lane] - minimum[lane]
            c0 = min(max(np.rint(a0 * inverse[lane]), zero), high)
            c1 = min(max(np.rint(a1 * inverse[lane]), zero), high)
            c2 = min(max(np.rint(a2 * inverse[lane]), zero), high)
            c3 = min(max(np.rint(a3 * inverse[lane]), zero), high)
            e0, e1 = a0 - c0 * step[lane], a1 - c1 * step[lane]
            e2, e3 = a2 - c2 * step[lane], a3 - c3 * step[lane]
            p0, p1, p2, p3 = w0 * c0, w1 * c1, w2 * c2, w3 * c3
            ones[lane] += p0 + p1 + p2 + p3
            squares[lane] += p0 * c0 + p1 * c1 + p2 * c2 + p3 * c3
            products[lane] += p0 * e0 + p1 * e1 + p2 * e2 + p3 * e3
            q0, q1, q2, q3 = w0 * e0, w1 * e1, w2 * e2, w3 * e3
            errors[lane] += q0 + q1 + q2 + q3
            losses[lane] += q0 * e0 + q1 * e1 + q2 * e2 + q3 * e3


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_affine(tried: Matrix, sums: Matrix, weight: Float, best: Matrix, ceiling: Float) -> None:
    """Keep step and minimum that suit the codes where they have less loss; ``best``: steps, minima, losses."""
    for lane in range(LANES):
        step, minimum = tried[0, lane], tried[2, lane]
        ones, squares, products = sums[0, lane], sums[1, lane], sums[2, lane]
        errors, loss = sums[3, lane], sums[4, lane]
        determinant = weight * squares - ones * ones
        change = (weight * products - ones * errors) / determinant
        shift = (squares * errors - ones * products) / determinant
        free = (determinant > np.float32(1e-6) * weight * squares) & (minimum + shift <= ceiling)
        # The minimum at its ceiling (or one code for all): fit the step alone.
        up = min(ceiling - minimum, np.float32(0))
        moved = products - up * ones
        alone = moved / squares if squares > 0 else np.float32(0)
        up = up if squares > 0 else np.float32(0)
        change, shift = change if free else alone, shift if free else up
        left = loss - change * products - shift * errors
        left = left if free else loss - (up + up) * errors + up * up * weight - alone * moved
        better = (left < best[2, lane]) & (step + change > 0)
        best[0, lane] = step + change if better else best[0, lane]
        best[1, lane] = minimum + shift if better else best[1, lane]
        best[2, lane] = left if better else best[2, lane]


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def fit_affine(
    begin: int,
    end: int,
    values: Matrix,
    importance: Vector,
    steps: Matrix,
    minima: Matrix,
    high: Float,
    ceiling: Float,
) -> None:
    """For each row and group, step and minimum with the least ``Σ w (x - step · code - minimum)²``.

    Args:
        begin, end, values, importance, steps: see :func:`fit_steps`.
        minima: ``[rows, groups]``, filled.
        high: of codes, which begin with zero.
        ceiling: which no minimum is above.
    """
    groups = steps.shape[1]
    size = values.shape[1] // groups
    x = np.zeros((size, LANES), np.float32)
    tried, best = np.ones((3, LANES), np.float32), np.zeros((3, LANES), np.float32)
    sums = np.zeros((5, LANES), np.float32)
    lowest, span = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    for first in range(begin, end, LANES):
        height = min(LANES, end - first)
        for group in range(groups):
            take_lanes(values, first, height, group * size, x)
            w = importance[group * size : (group + 1) * size]
            weight = np.float32(0)
            lowest[:], span[:] = x[0], x[0]
            for i in range(size):
                line = x[i]
                weight += w[i]
                for lane in range(LANES):
                    lowest[lane] = min(lowest[lane], line[lane])
                for lane in range(LANES):
                    span[lane] = max(span[lane], line[lane])
            for lane in range(LANES):
                lowest[lane] = min(lowest[lane], ceiling)
                span[lane] = span[lane] - lowest[lane]
                best[0, lane], best[1, lane], best[2, lane] = np.float32(0), lowest[lane], np.float32(np.inf)
            for candidate in range(CANDIDATES):
                reach = np.float32(high - 1 + candidate * (high / 4 + 1) / (CANDIDATES - 1))
                for lane in range(LANES):
                    tried[0, lane] = span[lane] / reach if span[lane] >= _TINY else np.float32(1)
                    tried[1, lane], tried[2, lane] = np.float32(1) / tried[0, lane], lowest[lane]
                _sum_affine(x, w, tried, sums, high)
                _take_affine(tried, sums, weight, best, ceiling)
            for _ in range(_ROUNDS):
                for lane in range(LANES):
                    tried[0, lane] = best[0, lane] if best[0, lane] > 0 else np.float32(1)
                    tried[1, lane], tried[2, lane] = np.float32(1) / tried[0, lane], best[1, lane]
                _sum_affine(x, w, tried, sums, high)
                _take_affine(tried, sums, weight, best, ceiling)
            for lane in range(height):
                some = span[lane] >= _TINY
                steps[first + lane, group] = best[0, lane] if some else np.float32(0)
                minima[first + lane, group] = best[1, lane] if some else lowest[lane]
