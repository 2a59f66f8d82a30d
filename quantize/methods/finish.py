"""How methods that only move scales between channels end: by rounding what they have prepared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.methods.base import Solution, Target
from llmconvert.quantize.methods.gptq import Gptq
from llmconvert.quantize.methods.nearest import NearestCodes

__all__ = ["Finish", "Finishing"]

Finish = Literal["nearest", "gptq"]


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
