"""Integers that scale sub-blocks, of super-blocks without minima (Q3_K, Q6_K, IQ4_XS): what their searches share.

A weight is ``scale · s · level`` with one ``s`` per sub-block. For a scale each ``s`` is chosen by error, and the scale
that suits the choice is fitted in closed form; the two take turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from llmconvert.gguf.ggml.blocks import Array
from llmconvert.gguf.ggml.fit import LANES

__all__ = ["add_choice", "fit_scales", "take_scales"]

Vector = np.ndarray[Any, Any]
Matrix = np.ndarray[Any, Any]


def fit_scales(
    steps: Array, least_sub: float, rounds: int, choose: Callable[[Array, Array, Array], None]
) -> tuple[Array, Array]:
    """Scales of super-blocks and the integers of their sub-blocks, each fitted to the other in turns.

    Args:
        steps: float32 ``[super-blocks, sub-blocks]``, the step that suits each sub-block alone.
        least_sub: the integer that the largest of a super-block's steps begins with.
        rounds: how often.
        choose: for scales, float32 ``[super-blocks]``, fills in integers, int8 ``[super-blocks, sub-blocks]``, and
            float32 ``[super-blocks, 2]``: the scale that suits these, and their loss.

    Returns:
        Scales as float16, and integers as int8.
    """
    largest = np.take_along_axis(steps, np.abs(steps).argmax(axis=1, keepdims=True), axis=1)[:, 0]
    scale = (largest / np.float32(least_sub)).astype(np.float16)
    best, least = scale, np.full(len(steps), np.inf, np.float32)
    subs = np.empty(steps.shape, np.int8)
    best_subs = np.zeros_like(subs)
    for _ in range(rounds):
        refit = np.empty((len(steps), 2), np.float32)
        choose(scale.astype(np.float32), subs, refit)
        better = refit[:, 1] < least
        least, best = np.where(better, refit[:, 1], least), np.where(better, scale, best)
        best_subs[better] = subs[better]
        scale = refit[:, 0].astype(np.float16)
    return best, best_subs


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def add_choice(best: Matrix, squares: Vector, values: Vector, form: Matrix) -> None:
    """Add a sub-block's choice to what a scale follows from.

    Args:
        best: ``[2, lanes]``: integers, and their losses.
        squares, values: sums of squared levels, and of levels times values.
        form: ``[3, lanes]``, added to.
    """
    for lane in range(LANES):
        form[0, lane] += best[0, lane] * best[0, lane] * squares[lane]
        form[1, lane] += best[0, lane] * values[lane]
        form[2, lane] += best[1, lane]


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def take_scales(form: Matrix, scale: Vector, height: int, first: int, stride: int, refit: Matrix) -> None:
    """The scale that suits what was chosen and its loss, for ``height`` lanes; the first one's is ``refit[first]``."""
    for lane in range(height):
        n = first + lane * stride
        refit[n, 0] = form[1, lane] / form[0, lane] if form[0, lane] > 0 else scale[lane]
        refit[n, 1] = form[2, lane]
