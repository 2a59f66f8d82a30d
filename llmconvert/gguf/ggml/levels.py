"""The table of IQ4_NL and IQ4_XS: 16 levels that lie closer to each other around zero, and the search for a step.

A code is an index into the table. As in :mod:`~llmconvert.gguf.ggml.fit`, several steps are tried, each is fitted to
the codes that it gives, and the best then alternates with its codes.
"""

from __future__ import annotations

from typing import Any, Final

import numba
import numpy as np

from llmconvert.gguf.ggml.fit import FAST

__all__ = ["LEVELS", "best_level_step", "nearest_level"]

#: ``kvalues_iq4nl`` of ggml-common.h, ascending.
LEVELS: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

_VALUES = np.array(LEVELS, np.float32)
# Middles between levels are multiples of a half, so the level next to a value follows from its whole number of halves.
_NEAREST = np.array(
    [int(np.searchsorted((_VALUES[1:] + _VALUES[:-1]) / 2, LEVELS[0] + half / 2, "right")) for half in range(481)],
    np.uint8,
)
_ROUNDS = 3
# Steps with which the extreme weight comes to lie from a little inside the last level to well beyond it.
_CANDIDATES = 12
_TINY = np.float32(1e-30)

Vector = np.ndarray[Any, Any]
Float = Any


@numba.njit(nogil=True, cache=True, inline="always")  # type: ignore[untyped-decorator]
def nearest_level(value: Float) -> int:
    """The code of the level next to a value, which is a weight over its step."""
    bounded = min(max(value, _VALUES[0]), _VALUES[15])
    return _NEAREST[int(np.floor((bounded - _VALUES[0]) * np.float32(2)))]  # type: ignore[no-any-return]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _refit(x: Vector, w: Vector, step: Float) -> tuple[Float, Float]:
    """Codes for ``step``, then the step that suits them: ``(step, loss)``."""
    inverse = np.float32(1) / np.float32(step)
    squares = products = loss = np.float32(0)
    for i in range(x.size):
        level = _VALUES[nearest_level(x[i] * inverse)]
        error = x[i] - level * step
        products += w[i] * error * level
        squares += w[i] * level * level
        loss += w[i] * error * error
    if squares <= 0:
        return step, loss
    change = products / squares
    return step + change, loss - change * products


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def best_level_step(x: Vector, w: Vector) -> Float:
    """The step, of either sign, with the least ``Σ w (x - step · level)²``."""
    extreme = np.float32(0)
    for i in range(x.size):
        if abs(x[i]) > abs(extreme):
            extreme = x[i]
    if abs(extreme) < _TINY:
        return np.float32(0)
    best, least = np.float32(0), np.float32(np.inf)
    for end in (_VALUES[0], _VALUES[15]):
        for candidate in range(_CANDIDATES):
            reach = end * (np.float32(0.75) + np.float32(candidate) * np.float32(0.05))
            step, loss = _refit(x, w, extreme / reach)
            if loss < least and step != 0:
                best, least = step, loss
    for _ in range(_ROUNDS):
        step, loss = _refit(x, w, best)
        if loss >= least or step == 0:
            break
        best, least = step, loss
    return best
