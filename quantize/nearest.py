"""Rounding to nearest with calibration: group scales of least squared error, weighted with the inputs' energy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmconvert.engine.precision import bfloat16_products
from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.base import Solution, Target
from llmconvert.quantize.rtn import round_to_codes
from llmconvert.quantize.scales import search_scales
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["NearestCodes", "quadratic_error"]

# Rows are rounded in slices of about this many weights, for the sake of the float32 copies.
_WEIGHTS_AT_ONCE = 1 << 22
# Columns of the Hessian multiplied at a time.
_PANEL_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class NearestCodes:
    """What methods that prepare weights for rounding end with."""

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        """As :meth:`llmconvert.quantize.base.Quantizer.quantize`; the Hessian is not changed."""
        assert hessian is not None
        return {target.name: _round(target, hessian.matrix, scale_dtype) for target in targets}

    def nbytes(self, rows: int, columns: int) -> int:
        """A slice of rows in float32: weights, scale candidates, quotients and errors; all codes twice."""
        at_once = min(rows, max(1, _WEIGHTS_AT_ONCE // columns)) * columns
        return at_once * 4 * 8 + rows * columns * 2


def quadratic_error(error: torch.Tensor, hessian: torch.Tensor) -> float:
    """``tr(E H Eᵀ)``, to about three digits where the processor multiplies bfloat16 faster.

    Args:
        error: float32 ``[rows, columns]``.
        hessian: symmetric, ``[columns, columns]``.
    """
    columns = error.shape[1]
    total = 0.0
    for start in range(0, columns, _PANEL_COLUMNS):
        stop = start + _PANEL_COLUMNS
        # What lies above this diagonal tile counts twice, what lies below it not at all.
        panel = hessian[:stop, start:stop].clone()
        panel[:start] *= 2
        with bfloat16_products():
            product = error[:, :stop] @ panel
        total += float(product.mul_(error[:, start:stop]).sum(dtype=torch.float64))
    return total


def _round(target: Target, hessian: torch.Tensor, scale_dtype: torch.dtype) -> Solution:
    rows, columns = target.weight.shape
    height = max(1, _WEIGHTS_AT_ONCE // columns)
    parts: list[QuantizedTensor] = []
    lost = energy = 0.0
    for start in range(0, rows, height):
        work = target.weight[start : start + height].float()
        scales = search_scales(target.name, work, hessian.diagonal(), target.scheme, scale_dtype)
        part = round_to_codes(work, scales, target.scheme)
        parts.append(part)
        energy += quadratic_error(work, hessian)
        lost += quadratic_error(part.dequantize(torch.float32).sub_(work), hessian)
    return Solution(QuantizedTensor.concatenate(parts), max(0.0, lost / energy) if energy > 0 else 0.0)
