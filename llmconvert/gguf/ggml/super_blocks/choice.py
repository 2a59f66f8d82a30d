"""What the integers of sub-blocks are chosen by: sums over their weights, rows side by side, compiled with numba.

See :mod:`llmconvert.gguf.ggml.fit`. A code stands for ``step · code - depth``.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.gguf.ggml.fit import FAST, LANES

__all__ = ["sum_codes", "sum_losses"]

Vector = np.ndarray[Any, Any]
Matrix = np.ndarray[Any, Any]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def sum_losses(x: Matrix, w: Vector, tried: Matrix, losses: Vector, low: Any, high: Any) -> None:
    """The weighed squared errors of the nearest codes.

    Args:
        x: ``[size, lanes]``; ``size`` is a multiple of four.
        w: ``[size]``.
        tried: ``[3, lanes]``: steps, one over them (0 for a step that is), and depths.
        losses: ``[lanes]``, filled.
        low, high: of codes.
    """
    step, inverse, depth = tried[0], tried[1], tried[2]
    losses[:] = 0
    for i in range(0, len(x), 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for lane in range(LANES):
            a0, a1, a2, a3 = (
                x0[lane] + depth[lane],
                x1[lane] + depth[lane],
                x2[lane] + depth[lane],
                x3[lane] + depth[lane],
            )
            e0 = a0 - min(max(np.rint(a0 * inverse[lane]), low), high) * step[lane]
            e1 = a1 - min(max(np.rint(a1 * inverse[lane]), low), high) * step[lane]
            e2 = a2 - min(max(np.rint(a2 * inverse[lane]), low), high) * step[lane]
            e3 = a3 - min(max(np.rint(a3 * inverse[lane]), low), high) * step[lane]
            losses[lane] += w0 * e0 * e0 + w1 * e1 * e1 + w2 * e2 * e2 + w3 * e3 * e3


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def sum_codes(x: Matrix, w: Vector, tried: Matrix, sums: Matrix, low: Any, high: Any) -> None:
    """Of the nearest codes ``q``: the weighed sums of ``q``, ``q²``, ``q x`` and ``x``.

    Args:
        x, w, tried, low, high: see :func:`sum_losses`.
        sums: ``[4, lanes]``, filled.
    """
    inverse, depth = tried[1], tried[2]
    ones, squares, products, values = sums[0], sums[1], sums[2], sums[3]
    sums[:] = 0
    for i in range(0, len(x), 4):
        x0, x1, x2, x3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = w[i], w[i + 1], w[i + 2], w[i + 3]
        for lane in range(LANES):
            c0 = min(max(np.rint((x0[lane] + depth[lane]) * inverse[lane]), low), high)
            c1 = min(max(np.rint((x1[lane] + depth[lane]) * inverse[lane]), low), high)
            c2 = min(max(np.rint((x2[lane] + depth[lane]) * inverse[lane]), low), high)
            c3 = min(max(np.rint((x3[lane] + depth[lane]) * inverse[lane]), low), high)
            p0, p1, p2, p3 = w0 * c0, w1 * c1, w2 * c2, w3 * c3
            ones[lane] += p0 + p1 + p2 + p3
            squares[lane] += p0 * c0 + p1 * c1 + p2 * c2 + p3 * c3
            products[lane] += p0 * x0[lane] + p1 * x1[lane] + p2 * x2[lane] + p3 * x3[lane]
            values[lane] += w0 * x0[lane] + w1 * x1[lane] + w2 * x2[lane] + w3 * x3[lane]
