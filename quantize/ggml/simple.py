"""What the block types of 32 weights share: parameters of a block, and codes for them.

Without importance these are those of llama.cpp and of the ``gguf`` package, to the bit: the extreme weight decides.
With it, the parameters have the least weighted squared error.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.quantize.ggml.blocks import Array, Blocks, block_importance
from llmconvert.quantize.ggml.fit import CANDIDATES, best_affine, best_step
from llmconvert.quantize.kernels import over_rows

__all__ = ["BLOCK", "fit_minimum_blocks", "fit_scale_blocks", "join_nibbles", "nearest_codes", "split_nibbles"]

BLOCK = 32


def fit_scale_blocks(values: Array, importance: Array | None, bits: int) -> Blocks:
    """Blocks of ``scale · (code - 2^(bits-1))``, the scale of either sign."""
    half = 1 << (bits - 1)
    if importance is None:
        blocks = values.reshape(-1, BLOCK)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
        scale = extreme / np.float32(-half)
        codes = _rounded(blocks, scale, np.float32(half + 0.5), 2 * half - 1)
        return Blocks(codes, _half(scale[:, 0]))
    steps = np.empty(values.size // BLOCK, np.float32)
    over_rows(
        _fit_steps,
        len(values),
        values,
        block_importance(importance, values.shape[1]),
        steps,
        np.float32(-half),
        np.float32(half - 1),
    )
    scale = _half(steps)
    return Blocks(nearest_codes(values, scale, None, half, 2 * half - 1), scale)


def fit_minimum_blocks(values: Array, importance: Array | None, bits: int) -> Blocks:
    """Blocks of ``scale · code + minimum``."""
    top = (1 << bits) - 1
    if importance is None:
        blocks = values.reshape(-1, BLOCK)
        minimum = blocks.min(axis=1, keepdims=True)
        scale = (blocks.max(axis=1, keepdims=True) - minimum) / np.float32(top)
        codes = _rounded(blocks - minimum, scale, np.float32(0.5), top)
        return Blocks(codes, _half(scale[:, 0]), _half(minimum[:, 0]))
    steps = np.empty(values.size // BLOCK, np.float32)
    minima = np.empty_like(steps)
    over_rows(
        _fit_affine,
        len(values),
        values,
        block_importance(importance, values.shape[1]),
        steps,
        minima,
        np.float32(top),
        np.float32(np.inf),
    )
    scale, minimum = _half(steps), _half(minima)
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


def _half(values: Array) -> Array:
    # A scale beyond float16 becomes infinite; the writer refuses such tensors by name before it comes to that.
    with np.errstate(over="ignore"):
        half: Array = values.astype(np.float16)
    return half


def _rounded(blocks: Array, scale: Array, offset: np.float32, top: int) -> Array:
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    # Truncating after an addition is how llama.cpp rounds; in float32, which decides ties.
    return np.clip((blocks * inverse + offset).astype(np.uint8), 0, top)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _fit_steps(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    low: float,
    high: float,
) -> None:
    x = np.empty(BLOCK, np.float32)
    w = np.empty(BLOCK, np.float32)
    blocks = values.shape[1] // BLOCK
    for row in range(begin, end):
        for block in range(blocks):
            for i in range(BLOCK):
                x[i] = values[row, block * BLOCK + i]
                w[i] = importance[block * BLOCK + i]
            steps[row * blocks + block] = best_step(x, w, low, high, CANDIDATES)


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _fit_affine(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    minima: np.ndarray[Any, Any],
    high: float,
    ceiling: float,
) -> None:
    x = np.empty(BLOCK, np.float32)
    w = np.empty(BLOCK, np.float32)
    blocks = values.shape[1] // BLOCK
    for row in range(begin, end):
        for block in range(blocks):
            for i in range(BLOCK):
                x[i] = values[row, block * BLOCK + i]
                w[i] = importance[block * BLOCK + i]
            steps[row * blocks + block], minima[row * blocks + block] = best_affine(x, w, high, ceiling)
