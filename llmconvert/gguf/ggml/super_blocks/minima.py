"""K-quants with minima (Q2_K, Q4_K, Q5_K): super-blocks of 256 weights, and the search for their parameters.

A weight is ``scale · s · code - minimum · m``, ``s`` and ``m`` of 4 or 6 bits per sub-block, the others float16. Each
sub-block's own best step and minimum come first (:func:`~llmconvert.gguf.ggml.fit.best_affine`). Rounding these to
integers and float16 costs something, so ``s`` and ``m`` are then chosen by the error they cause, the two float16
numbers fitted to that choice in closed form, and so on in turn; the best round counts.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, Blocks, block_importance
from llmconvert.gguf.ggml.fit import FAST, best_affine

__all__ = [
    "SUPER_BLOCK",
    "fit_minimum_super_blocks",
    "join_pairs",
    "join_quarters",
    "pack_six",
    "split_pairs",
    "split_quarters",
    "unpack_six",
]

SUPER_BLOCK = 256
_ROUNDS = 3


def fit_minimum_super_blocks(
    values: Array, importance: Array | None, bits: int, *, sub_blocks: int = 8, top: int = 63
) -> Blocks:
    """Super-blocks for float32 ``[rows, columns]`` with codes of ``bits``.

    Args:
        values: finite.
        importance: see :meth:`~llmconvert.gguf.ggml.blocks.Codec.encode`.
        bits: of a code.
        sub_blocks: of a super-block.
        top: the largest ``s`` and ``m``.
    """
    count, rows = values.size // SUPER_BLOCK, len(values)
    weights = block_importance(importance, values.shape[1])
    high, most = np.float32((1 << bits) - 1), np.float32(top)
    steps = np.empty((count, sub_blocks), np.float32)
    depths = np.empty((count, sub_blocks), np.float32)
    over_rows(_fit_sub_blocks, rows, values, weights, steps, depths, high)
    scale = (steps.max(axis=1) / most).astype(np.float16)
    minimum = (depths.max(axis=1) / most).astype(np.float16)
    best_scale, best_minimum = scale, minimum
    least = np.full(count, np.inf, np.float32)
    subs = np.empty((2, count, sub_blocks), np.uint8)
    best_subs = np.zeros_like(subs)
    codes = np.empty((count, SUPER_BLOCK), np.uint8)
    for _ in range(_ROUNDS):
        refit = np.empty((count, 3), np.float32)
        wide = np.stack([scale, minimum], axis=1).astype(np.float32)
        over_rows(_choose_sub_scales, rows, values, weights, steps, depths, wide, subs[0], subs[1], refit, high, most)
        better = refit[:, 2] < least
        least = np.where(better, refit[:, 2], least)
        best_scale, best_minimum = np.where(better, scale, best_scale), np.where(better, minimum, best_minimum)
        best_subs[:, better] = subs[:, better]
        scale, minimum = refit[:, 0].astype(np.float16), refit[:, 1].astype(np.float16)
    wide = np.stack([best_scale, best_minimum], axis=1).astype(np.float32)
    over_rows(_take_codes, rows, values, wide, best_subs[0], best_subs[1], codes, high)
    return Blocks(codes, best_scale, best_minimum, best_subs[0], best_subs[1])


def pack_six(scales: Array, minima: Array) -> Array:
    """Eight 6-bit scales and minima per super-block in 12 bytes.

    The first four scales and minima lie in the low bits of 4 bytes each; of the others the low nibbles share 4 bytes
    more, and their two high bits lie above the first ones.
    """
    first = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], axis=1)


def unpack_six(raw: Array) -> tuple[Array, Array]:
    """The inverse of :func:`pack_six`."""
    first, second, low = raw[:, :4], raw[:, 4:8], raw[:, 8:]
    scales = np.concatenate([first & 63, (low & 15) | ((first >> 6) << 4)], axis=1)
    minima = np.concatenate([second & 63, (low >> 4) | ((second >> 6) << 4)], axis=1)
    return scales, minima


def join_pairs(codes: Array) -> Array:
    """``[n, 256]`` codes below 16 → ``[n, 128]`` bytes; of every 64 the second half goes into the high nibbles."""
    pairs = codes.reshape(len(codes), -1, 2, 32)
    joined: Array = pairs[:, :, 0] | (pairs[:, :, 1] << 4)
    return joined.reshape(len(codes), -1)


def split_pairs(raw: Array) -> Array:
    """The inverse of :func:`join_pairs`."""
    joined = raw.reshape(len(raw), -1, 32)
    return np.stack([joined & 15, joined >> 4], axis=2).reshape(len(raw), -1)


def join_quarters(codes: Array) -> Array:
    """``[n, 256]`` codes below 4 → ``[n, 64]`` bytes, of each half 32: its four quarters share them."""
    quarters = codes.reshape(len(codes), 2, 4, 32)
    joined: Array = quarters[:, :, 0] | (quarters[:, :, 1] << 2) | (quarters[:, :, 2] << 4) | (quarters[:, :, 3] << 6)
    return joined.reshape(len(codes), -1)


def split_quarters(raw: Array) -> Array:
    """The inverse of :func:`join_quarters`."""
    shifted = raw.reshape(len(raw), 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    codes: Array = (shifted & 3).reshape(len(raw), -1)
    return codes


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _fit_sub_blocks(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    depths: np.ndarray[Any, Any],
    high: float,
) -> None:
    """The best step and (negated) minimum of every sub-block by itself."""
    sub_blocks = steps.shape[1]
    size = SUPER_BLOCK // sub_blocks
    x = np.empty(size, np.float32)
    w = np.empty(size, np.float32)
    per_row = values.shape[1] // SUPER_BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            for sub in range(sub_blocks):
                start = block * SUPER_BLOCK + sub * size
                for i in range(size):
                    x[i] = values[row, start + i]
                    w[i] = importance[start + i]
                step, minimum = best_affine(x, w, high, np.float32(0))
                steps[row * per_row + block, sub] = step
                depths[row * per_row + block, sub] = -minimum


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _choose_sub_scales(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    depths: np.ndarray[Any, Any],
    wide: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    minima: np.ndarray[Any, Any],
    refit: np.ndarray[Any, Any],
    high: float,
    top: float,
) -> None:
    """For given ``wide`` (scale, minimum): each sub-block's pair of integers among the nearest nine, by error.

    ``refit`` gets the scale and the minimum that suit the choice, and its loss.
    """
    sub_blocks = steps.shape[1]
    size = SUPER_BLOCK // sub_blocks
    x = np.empty(size, np.float32)
    w = np.empty(size, np.float32)
    zero, one = np.float32(0), np.float32(1)
    per_row = values.shape[1] // SUPER_BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            n = row * per_row + block
            scale, minimum = wide[n, 0], wide[n, 1]
            aa = ab = bb = ax = bx = total = zero
            for sub in range(sub_blocks):
                start = block * SUPER_BLOCK + sub * size
                for i in range(size):
                    x[i] = values[row, start + i]
                    w[i] = importance[start + i]
                near_s = np.rint(steps[n, sub] / scale) if scale > 0 else zero
                near_m = np.rint(depths[n, sub] / minimum) if minimum > 0 else zero
                best_s, best_m, least = zero, zero, np.float32(np.inf)
                for ds in range(-1, 2):
                    s = near_s + np.float32(ds)
                    if s < 0 or s > top:
                        continue
                    step = scale * s
                    inverse = one / step if step > 0 else zero
                    for dm in range(-1, 2):
                        m = near_m + np.float32(dm)
                        if m < 0 or m > top:
                            continue
                        depth = minimum * m
                        loss = zero
                        for i in range(size):
                            above = x[i] + depth
                            error = above - min(max(np.rint(above * inverse), zero), high) * step
                            loss += w[i] * error * error
                        if loss < least:
                            best_s, best_m, least = s, m, loss
                scales[n, sub], minima[n, sub] = np.uint8(best_s), np.uint8(best_m)
                total += least
                step, depth = scale * best_s, minimum * best_m
                inverse = one / step if step > 0 else zero
                for i in range(size):
                    a = best_s * min(max(np.rint((x[i] + depth) * inverse), zero), high)
                    weighted = w[i] * a
                    aa += weighted * a
                    ab += weighted * best_m
                    bb += w[i] * best_m * best_m
                    ax += weighted * x[i]
                    bx += w[i] * best_m * x[i]
            # Least squares of x ≈ scale · a - minimum · b.
            determinant = aa * bb - ab * ab
            refit[n, 0], refit[n, 1], refit[n, 2] = scale, minimum, total
            if determinant > np.float32(1e-6) * aa * bb:
                fitted = (ax * bb - bx * ab) / determinant
                depth = (ax * ab - bx * aa) / determinant
                if fitted > 0 and depth >= 0:
                    refit[n, 0], refit[n, 1] = fitted, depth
            elif aa > 0 and bb == 0:
                refit[n, 0] = ax / aa


@numba.njit(nogil=True, cache=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_codes(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    wide: np.ndarray[Any, Any],
    scales: np.ndarray[Any, Any],
    minima: np.ndarray[Any, Any],
    codes: np.ndarray[Any, Any],
    high: float,
) -> None:
    """The nearest code of every weight for settled parameters."""
    sub_blocks = scales.shape[1]
    size = SUPER_BLOCK // sub_blocks
    per_row = values.shape[1] // SUPER_BLOCK
    for row in range(begin, end):
        for block in range(per_row):
            n = row * per_row + block
            for sub in range(sub_blocks):
                step = wide[n, 0] * np.float32(scales[n, sub])
                depth = wide[n, 1] * np.float32(minima[n, sub])
                inverse = np.float32(1) / step if step > 0 else np.float32(0)
                start = sub * size
                for i in range(size):
                    above = values[row, block * SUPER_BLOCK + start + i] + depth
                    codes[n, start + i] = np.uint8(min(max(np.rint(above * inverse), np.float32(0)), high))
