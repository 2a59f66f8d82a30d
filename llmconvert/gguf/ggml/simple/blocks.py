"""Legacy GGML blocks of 32 weights (Q4_0 … Q8_0): parameters of a block, and codes for them.

Without importance these are those of llama.cpp and of the ``gguf`` package, to the bit: the extreme weight decides.
With it, the parameters have the least weighted squared error.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, Blocks, block_importance
from llmconvert.gguf.ggml.fit import CANDIDATES, fit_affine, fit_steps

__all__ = [
    "BLOCK",
    "fit_minimum_blocks",
    "fit_scale_blocks",
    "half",
    "join_nibbles",
    "nearest_codes",
    "split_nibbles",
]

BLOCK = 32


def fit_scale_blocks(values: Array, importance: Array | None, bits: int) -> Blocks:
    """Blocks of ``scale · (code - 2^(bits-1))``, the scale of either sign."""
    zero = 1 << (bits - 1)
    if importance is None:
        steps, codes = _empty(values)
        over_rows(_take_extreme, len(values), values, steps, codes, np.float32(zero))
        return Blocks(codes, half(steps))
    steps = np.empty((len(values), values.shape[1] // BLOCK), np.float32)
    weights, limits = block_importance(importance, values.shape[1]), (np.float32(-zero), np.float32(zero - 1))
    over_rows(fit_steps, len(values), values, weights, steps, *limits, CANDIDATES)
    scale = half(steps.reshape(-1))
    return Blocks(nearest_codes(values, scale, None, zero, 2 * zero - 1), scale)


def fit_minimum_blocks(values: Array, importance: Array | None, bits: int) -> Blocks:
    """Blocks of ``scale · code + minimum``."""
    top = (1 << bits) - 1
    if importance is None:
        steps, codes = _empty(values)
        minima = np.empty_like(steps)
        over_rows(_take_range, len(values), values, steps, minima, codes, np.float32(top))
        return Blocks(codes, half(steps), half(minima))
    steps = np.empty((len(values), values.shape[1] // BLOCK), np.float32)
    minima, weights = np.empty_like(steps), block_importance(importance, values.shape[1])
    over_rows(fit_affine, len(values), values, weights, steps, minima, np.float32(top), np.float32(np.inf))
    scale, minimum = half(steps.reshape(-1)), half(minima.reshape(-1))
    return Blocks(nearest_codes(values, scale, minimum, 0, top), scale, minimum)


def nearest_codes(values: Array, scale: Array, minimum: Array | None, zero: int, top: int) -> Array:
    """The codes nearest to the values for float16 parameters, uint8 ``[n, 32]``."""
    blocks = values.reshape(-1, BLOCK)
    step = scale.astype(np.float32)[:, None]
    if minimum is not None:
        blocks = blocks - minimum.astype(np.float32)[:, None]
    scaled = blocks * np.divide(np.float32(1), step, out=np.zeros_like(step), where=step != 0)
    codes: Array = np.clip(np.rint(scaled) + np.float32(zero), 0, top).astype(np.uint8)
    return codes


def join_nibbles(codes: Array) -> Array:
    """``[n, 2k]`` codes below 16 → ``[n, k]`` bytes: the first half in the low nibbles, the second in the high ones."""
    middle = codes.shape[1] // 2
    joined: Array = codes[:, :middle] | (codes[:, middle:] << 4)
    return joined


def split_nibbles(raw: Array) -> Array:
    """The inverse of :func:`join_nibbles`."""
    return np.concatenate([raw & 15, raw >> 4], axis=1)


def half(values: Array) -> Array:
    """float16 of float32 scales and minima."""
    # A scale beyond float16 becomes infinite; the writer refuses such tensors by name before it comes to that.
    with np.errstate(over="ignore"):
        rounded: Array = values.astype(np.float16)
    return rounded


def _empty(values: Array) -> tuple[Array, Array]:
    """Steps and codes of the blocks, to be filled."""
    count = values.size // BLOCK
    return np.empty(count, np.float32), np.empty((count, BLOCK), np.uint8)


# Truncating after an addition is how llama.cpp rounds; in float32, which decides ties.
@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_extreme(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    zero: float,
) -> None:
    """The weight of largest magnitude becomes code 0."""
    per_row = values.shape[1] // BLOCK
    offset, top = zero + np.float32(0.5), zero + zero - np.float32(1)
    for row in range(begin, end):
        for block in range(per_row):
            n, start = row * per_row + block, block * BLOCK
            extreme = np.float32(0)
            for i in range(BLOCK):
                if abs(values[row, start + i]) > abs(extreme):
                    extreme = values[row, start + i]
            step = extreme / -zero
            inverse = np.float32(1) / step if step != 0 else np.float32(0)
            steps[n] = step
            for i in range(BLOCK):
                codes[n, i] = np.uint8(min(values[row, start + i] * inverse + offset, top))


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_range(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    minima: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    top: float,
) -> None:
    """The lowest weight becomes code 0, the highest the last one."""
    per_row = values.shape[1] // BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            n, start = row * per_row + block, block * BLOCK
            lowest = highest = values[row, start]
            for i in range(1, BLOCK):
                lowest, highest = min(lowest, values[row, start + i]), max(highest, values[row, start + i])
            step = (highest - lowest) / top
            inverse = np.float32(1) / step if step != 0 else np.float32(0)
            steps[n], minima[n] = step, lowest
            for i in range(BLOCK):
                codes[n, i] = np.uint8(min((values[row, start + i] - lowest) * inverse + np.float32(0.5), top))
