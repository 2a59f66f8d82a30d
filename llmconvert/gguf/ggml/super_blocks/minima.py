"""K-quants with minima (Q2_K, Q4_K, Q5_K): super-blocks of 256 weights, and the search for their parameters.

A weight is ``scale · s · code - minimum · m``, ``s`` and ``m`` of 4 or 6 bits per sub-block, the others float16. Each
sub-block's own best step and minimum come first (:func:`~llmconvert.gguf.ggml.fit.fit_affine`). Rounding these to
integers and float16 costs something, so ``s`` and ``m`` are then chosen by the error they cause, the two float16
numbers fitted to that choice in closed form, and so on in turn; the best round counts.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from llmconvert.compute.rows import over_rows
from llmconvert.gguf.ggml.blocks import Array, Blocks, block_importance
from llmconvert.gguf.ggml.fit import FAST, LANES, fit_affine, take_lanes
from llmconvert.gguf.ggml.super_blocks.choice import sum_codes, sum_losses

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
    steps = np.empty((rows, values.shape[1] // SUPER_BLOCK * sub_blocks), np.float32)
    minima = np.empty_like(steps)
    over_rows(fit_affine, rows, values, weights, steps, minima, high, np.float32(0))
    scale = (steps.reshape(count, -1).max(axis=1) / most).astype(np.float16)
    minimum = (-minima.reshape(count, -1).min(axis=1) / most).astype(np.float16)
    best_scale, best_minimum = scale, minimum
    least = np.full(count, np.inf, np.float32)
    subs = np.empty((2, count, sub_blocks), np.uint8)
    best_subs = np.zeros_like(subs)
    codes = np.empty((count, SUPER_BLOCK), np.uint8)
    for _ in range(_ROUNDS):
        refit = np.empty((count, 3), np.float32)
        wide = np.stack([scale, minimum], axis=1).astype(np.float32)
        over_rows(_choose_sub_scales, rows, values, weights, steps, minima, wide, subs[0], subs[1], refit, high, most)
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
def _choose_sub_scales(
    begin: int,
    end: int,
    values: np.ndarray[Any, Any],
    importance: np.ndarray[Any, Any],
    steps: np.ndarray[Any, Any],
    minima: np.ndarray[Any, Any],
    wide: np.ndarray[Any, Any],
    scale_subs: np.ndarray[Any, Any],
    minimum_subs: np.ndarray[Any, Any],
    refit: np.ndarray[Any, Any],
    high: float,
    top: float,
) -> None:
    """For given ``wide`` (scale, minimum): each sub-block's pair of integers among the nearest nine, by error.

    ``refit`` gets the scale and the minimum that suit the choice, and its loss.
    """
    sub_blocks = scale_subs.shape[1]
    size = SUPER_BLOCK // sub_blocks
    per_row = values.shape[1] // SUPER_BLOCK
    zero = np.float32(0)
    x = np.zeros((size, LANES), np.float32)
    tried, sums, losses = (
        np.zeros((3, LANES), np.float32),
        np.zeros((4, LANES), np.float32),
        np.zeros(LANES, np.float32),
    )
    outer, near, best = (
        np.zeros((2, LANES), np.float32),
        np.zeros((2, LANES), np.float32),
        np.zeros((3, LANES), np.float32),
    )
    form = np.zeros((6, LANES), np.float32)
    for first in range(begin, end, LANES):
        height = min(LANES, end - first)
        for block in range(per_row):
            for lane in range(height):
                n = (first + lane) * per_row + block
                outer[0, lane], outer[1, lane] = wide[n, 0], wide[n, 1]
            form[:] = 0
            for sub in range(sub_blocks):
                start, group = block * SUPER_BLOCK + sub * size, block * sub_blocks + sub
                take_lanes(values, first, height, start, x)
                w = importance[start : start + size]
                weight = w.sum()
                for lane in range(height):
                    scale, minimum = outer[0, lane], outer[1, lane]
                    near[0, lane] = np.rint(steps[first + lane, group] / scale) if scale > 0 else zero
                    near[1, lane] = np.rint(-minima[first + lane, group] / minimum) if minimum > 0 else zero
                best[0], best[1], best[2] = zero, zero, np.float32(np.inf)
                for ds in range(-1, 2):
                    for lane in range(LANES):
                        step = outer[0, lane] * (near[0, lane] + np.float32(ds))
                        tried[0, lane], tried[1, lane] = step, np.float32(1) / step if step > 0 else zero
                    for dm in range(-1, 2):
                        for lane in range(LANES):
                            tried[2, lane] = outer[1, lane] * (near[1, lane] + np.float32(dm))
                        sum_losses(x, w, tried, losses, zero, high)
                        _take_pair(near, ds, dm, losses, best, top)
                for lane in range(LANES):
                    step = outer[0, lane] * best[0, lane]
                    tried[0, lane], tried[1, lane] = step, np.float32(1) / step if step > 0 else zero
                    tried[2, lane] = outer[1, lane] * best[1, lane]
                sum_codes(x, w, tried, sums, zero, high)
                _add_up(sums, best, weight, form)
                for lane in range(height):
                    n = (first + lane) * per_row + block
                    scale_subs[n, sub], minimum_subs[n, sub] = np.uint8(best[0, lane]), np.uint8(best[1, lane])
            for lane in range(height):
                _refit(form[:, lane], outer[:, lane], refit[(first + lane) * per_row + block])


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _take_pair(
    near: np.ndarray[Any, Any],
    ds: int,
    dm: int,
    losses: np.ndarray[Any, Any],
    best: np.ndarray[Any, Any],
    top: float,
) -> None:
    """Keep ``near + (ds, dm)`` where it is within bounds and loses less; ``best``: both integers, and losses."""
    for lane in range(LANES):
        s, m = near[0, lane] + np.float32(ds), near[1, lane] + np.float32(dm)
        better = (s >= 0) & (s <= top) & (m >= 0) & (m <= top) & (losses[lane] < best[2, lane])
        best[0, lane] = s if better else best[0, lane]
        best[1, lane] = m if better else best[1, lane]
        best[2, lane] = losses[lane] if better else best[2, lane]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _add_up(sums: np.ndarray[Any, Any], best: np.ndarray[Any, Any], weight: float, form: np.ndarray[Any, Any]) -> None:
    """Add a sub-block to the sums that scale and minimum of its super-block follow from.

    With ``a = s · code`` and ``b = m`` they are of ``a²``, ``a b``, ``b²``, ``a x``, ``b x``, and the losses.
    """
    for lane in range(LANES):
        s, m = best[0, lane], best[1, lane]
        form[0, lane] += s * s * sums[1, lane]
        form[1, lane] += s * m * sums[0, lane]
        form[2, lane] += m * m * weight
        form[3, lane] += s * sums[2, lane]
        form[4, lane] += m * sums[3, lane]
        form[5, lane] += best[2, lane]


@numba.njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")  # type: ignore[untyped-decorator]
def _refit(form: np.ndarray[Any, Any], outer: np.ndarray[Any, Any], refit: np.ndarray[Any, Any]) -> None:
    """Least squares of ``x ≈ scale · a - minimum · b``."""
    aa, ab, bb, ax, bx = form[0], form[1], form[2], form[3], form[4]
    determinant = aa * bb - ab * ab
    refit[0], refit[1], refit[2] = outer[0], outer[1], form[5]
    if determinant > np.float32(1e-6) * aa * bb:
        fitted = (ax * bb - bx * ab) / determinant
        depth = (ax * ab - bx * aa) / determinant
        if fitted > 0 and depth >= 0:
            refit[0], refit[1] = fitted, depth
    elif aa > 0 and bb == 0:
        refit[0] = ax / aa


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
