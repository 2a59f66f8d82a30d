"""What methods make of weights that they encode in GGML's types by themselves, as codes of schemes like others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmconvert.engine.statistics import Hessian
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.quantize.formats.gguf import Gguf
from llmconvert.quantize.methods.base import Calibration, GgmlQuantizer, Numbers, Solution, Target
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["Encoding", "encoded"]


def encoded(method: GgmlQuantizer, rows: torch.Tensor, squares: torch.Tensor | None, scheme: Scheme) -> QuantizedTensor:
    """Rows ``[rows, columns]`` in a type; ``squares`` ``[columns]`` weigh the errors of columns."""
    raw = method.encode(load_codec(scheme.block or ""), rows.float().cpu().contiguous(), squares)
    return Gguf().unpack("rows", {"rows.weight": raw}, scheme)


@dataclass(frozen=True, slots=True)
class Encoding:
    """A method's rounding as a :class:`~llmconvert.quantize.methods.base.Quantizer`, for measuring what it costs.

    Attributes:
        method: what rounds, with the mean squares of inputs or without.
    """

    method: GgmlQuantizer

    calibration: ClassVar[Calibration] = "inputs"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "any"

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        squares = None
        if hessian is not None and self.method.calibration != "none":
            squares = hessian.matrix.diagonal().float().cpu()
        return {
            target.name: Solution(encoded(self.method, target.weight, squares, target.scheme)) for target in targets
        }

    def nbytes(self, rows: int, columns: int) -> int:
        """Weights in float32, their codes, and what a type's search holds of them."""
        return rows * columns * 12
