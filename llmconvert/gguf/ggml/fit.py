"""Scales and minima of single blocks by (weighted) least squares, compiled with numba.

A scale decides the codes, and codes decide the scale that suits them best. So several scales are tried; for each, the
codes are taken and the scale fitted to them in closed form; the best fit then alternates between the two a few times.
Residuals rather than values are fitted: the differences between candidates would drown in float32 sums of squares.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["CANDIDATES", "FAST", "ROUNDS", "TINY", "best_affine", "best_step"]

# Reordering sums lets the compiler vectorize them; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz"}
#: Steps tried where the choice matters most, below 6 bits.
CANDIDATES = 20
#: How often codes and steps are then fitted to each other.
ROUNDS = 3
#: Below that a block is zero.
TINY = np.float32(1e-30)

Vector = np.ndarray[Any, Any]
# float32 throughout: one float64 among them would halve the vector units.
Float = Any


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _refit_step(x: Vector, w: Vector, step: Float, low: Float, high: Float) -> tuple[Float, Float]:
    """Codes for ``step``, then the step that suits them: ``(step, loss)``."""
    inverse = np.float32(1) / np.float32(step)
    squares = products = loss = np.float32(0)
    for i in range(x.size):
        code = min(max(np.rint(x[i] * inverse), low), high)
        error = x[i] - code * step
        products += w[i] * error * code
        squares += w[i] * code * code
        loss += w[i] * error * error
    if squares <= 0:
        return step, loss
    change = products / squares
    return step + change, loss - change * products


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def best_step(x: Vector, w: Vector, low: Float, high: Float, candidates: int) -> Float:
    """The step, of either sign, with the least ``Σ w (x - step · code)²`` for codes in ``[low, high]``.

    ``candidates`` steps are tried for each sign, at least two.
    """
    extreme = np.float32(0)
    for i in range(x.size):
        if abs(x[i]) > abs(extreme):
            extreme = x[i]
    if abs(extreme) < TINY:
        return np.float32(0)
    best, least = np.float32(0), np.float32(np.inf)
    for end in (low, high):
        for candidate in range(candidates):
            # From one level short of the range's end to a quarter beyond it, where the extreme is clipped.
            reach = abs(end) - 1 + candidate * (abs(end) / 4 + 1) / (candidates - 1)
            step, loss = _refit_step(x, w, extreme / np.float32(reach if end > 0 else -reach), low, high)
            if loss < least:
                best, least = step, loss
    for _ in range(ROUNDS):
        step, loss = _refit_step(x, w, best, low, high)
        if loss >= least:
            break
        best, least = step, loss
    return best


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _refit_affine(
    x: Vector, w: Vector, step: Float, minimum: Float, high: Float, ceiling: Float
) -> tuple[Float, Float, Float]:
    """Codes for ``step`` and ``minimum``, then what suits them: ``(step, minimum, loss)``."""
    inverse = np.float32(1) / np.float32(step)
    weight = ones = errors = squares = products = loss = np.float32(0)
    for i in range(x.size):
        above = x[i] - minimum
        code = min(max(np.rint(above * inverse), np.float32(0)), high)
        error = above - code * step
        weighted = w[i] * code
        weight += w[i]
        ones += weighted
        squares += weighted * code
        products += weighted * error
        errors += w[i] * error
        loss += w[i] * error * error
    determinant = weight * squares - ones * ones
    if determinant > np.float32(1e-6) * weight * squares:
        change = (weight * products - ones * errors) / determinant
        shift = (squares * errors - ones * products) / determinant
        if minimum + shift <= ceiling:
            return step + change, minimum + shift, loss - change * products - shift * errors
    # The minimum at its ceiling (or one code for all): fit the step alone.
    shift = min(ceiling - minimum, np.float32(0))
    if squares <= 0:
        return step, minimum, loss
    moved = products - shift * ones
    change = moved / squares
    return (
        step + change,
        minimum + shift,
        loss - (shift + shift) * errors + shift * shift * weight - change * moved,
    )


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def best_affine(x: Vector, w: Vector, high: Float, ceiling: Float) -> tuple[Float, Float]:
    """Step and minimum with the least ``Σ w (x - step · code - minimum)²`` for codes in ``[0, high]``.

    The minimum is at most ``ceiling``.
    """
    lowest, highest = x[0], x[0]
    for i in range(x.size):
        lowest = min(lowest, x[i])
        highest = max(highest, x[i])
    lowest = min(lowest, ceiling)
    if highest - lowest < TINY:
        return np.float32(0), lowest
    best, bottom, least = np.float32(0), lowest, np.float32(np.inf)
    for candidate in range(CANDIDATES):
        reach = high - 1 + candidate * (high / 4 + 1) / (CANDIDATES - 1)
        step, minimum, loss = _refit_affine(x, w, (highest - lowest) / np.float32(reach), lowest, high, ceiling)
        if loss < least and step > 0:
            best, bottom, least = step, minimum, loss
    for _ in range(ROUNDS):
        step, minimum, loss = _refit_affine(x, w, best, bottom, high, ceiling)
        if loss >= least or step <= 0:
            break
        best, bottom, least = step, minimum, loss
    return best, bottom
