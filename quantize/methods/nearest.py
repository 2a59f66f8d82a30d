"""Final rounding step of AWQ and SmoothQuant: what was moved between channels is rounded to nearest, or by GPTQ.

Nearest means group scales of least squared error, weighted with the inputs' energy (AWQ's clipping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from llmconvert.engine.statistics import Hessian
from llmconvert.memory import row_slices, rows_at_once
from llmconvert.quantize.methods.base import Solution, Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.rtn import round_to_codes, with_reach
from llmconvert.quantize.solve.hessian import quadratic_form
from llmconvert.quantize.solve.scales import search_scales
from llmconvert.quantize.solve.shared_scales import share_scales
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["Finish", "Finishing", "NearestCodes"]

Finish = Literal["nearest", "gptq"]

# Rows are rounded in slices of about this many weights, for the sake of the float32 copies.
_WEIGHTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class NearestCodes:
    """Rounding to nearest with calibration."""

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        """As :meth:`llmconvert.quantize.methods.base.Quantizer.quantize`; the Hessian is not changed."""
        assert hessian is not None
        return {target.name: _round(target, hessian.matrix, scale_dtype) for target in with_reach(targets)}

    def nbytes(self, rows: int, columns: int) -> int:
        """A slice of rows in float32: weights, scale candidates, quotients and errors; all codes twice."""
        at_once = rows_at_once(rows, columns, _WEIGHTS_AT_ONCE) * columns
        return at_once * 4 * 8 + rows * columns * 2


class Finishing:
    """The part of :class:`~llmconvert.quantize.methods.base.Quantizer` that :attr:`then` decides."""

    __slots__ = ()

    then: Finish

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        return self._last.quantize(targets, hessian, scale_dtype)

    def nbytes(self, rows: int, columns: int) -> int:
        return self._last.nbytes(rows, columns)

    @property
    def _last(self) -> NearestCodes | Gptq:
        return Gptq() if self.then == "gptq" else NearestCodes()


def _round(target: Target, hessian: torch.Tensor, scale_dtype: torch.dtype) -> Solution:
    parts: list[QuantizedTensor] = []
    lost = energy = 0.0
    shared = share_scales({target.name: target.weight}, target.scheme, scale_dtype, reach=target.reach)
    for rows in row_slices(target.weight.shape, _WEIGHTS_AT_ONCE):
        work = target.weight[rows].float()
        scales = shared.fixed(rows) or search_scales(
            target.name, work, hessian.diagonal(), target.scheme, scale_dtype, divisor=shared.divisor
        )
        part = round_to_codes(work, scales, shared.by_rows)
        parts.append(part)
        energy += quadratic_form(work, hessian)
        lost += quadratic_form(part.dequantize(torch.float32).sub_(work), hessian)
    tensor = shared.tensor(0, QuantizedTensor.concatenate(parts))
    return Solution(tensor, max(0.0, lost / energy) if energy > 0 else 0.0, energy=energy)
