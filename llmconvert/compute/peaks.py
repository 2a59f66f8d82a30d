"""The largest magnitude of every block of a matrix: what tells values that are not finite, and blocks that fade."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch

from llmconvert.compute.rows import over_rows

__all__ = ["block_peaks"]


def block_peaks(values: torch.Tensor, size: int) -> torch.Tensor:
    """The largest magnitude of blocks of ``size`` columns, ``[rows, columns // size]``; NaN where there is one.

    Args:
        values: float32 ``[rows, columns]``; others, and those on a GPU, are looked at in torch.
        size: of a block; columns are a multiple of it.
    """
    if values.device.type != "cpu" or values.dtype != torch.float32:
        return values.reshape(len(values), -1, size).abs().amax(-1)
    peaks = torch.empty((len(values), values.shape[1] // size), dtype=torch.float32)
    over_rows(_take_peaks, len(values), values.contiguous().view(torch.int32), peaks.view(torch.int32), size)
    return peaks


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _take_peaks(begin: int, end: int, bits: np.ndarray[Any, Any], peaks: np.ndarray[Any, Any], size: int) -> None:
    """Without its sign the bits of a float are an integer in the same order, NaN above all others."""
    mask = np.int32(0x7FFFFFFF)
    for row in range(begin, end):
        for block in range(peaks.shape[1]):
            part = bits[row, block * size : (block + 1) * size]
            largest = np.int32(0)
            for i in range(size):
                largest = max(largest, part[i] & mask)
            peaks[row, block] = largest
