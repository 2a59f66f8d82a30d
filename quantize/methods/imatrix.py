"""Importance matrix (llama.cpp's ``llama-imatrix``): GGML blocks whose errors are weighted by the mean squared inputs.

An error in a weight changes the output by the error times the input, so the mean squared error of an output is
``Σ importance · error²`` as far as inputs are uncorrelated, where importance is the mean square of a column's inputs:
the diagonal of the linear's Hessian. llama.cpp calls the whole an importance matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from llmconvert.errors import CalibrationError
from llmconvert.gguf.ggml.blocks import Codec
from llmconvert.quantize.methods.base import Calibration, Numbers

__all__ = ["Imatrix", "mean_squares"]


@dataclass(frozen=True, slots=True)
class Imatrix:
    """The method; it has no settings."""

    calibration: ClassVar[Calibration] = "squares"
    original: ClassVar[bool] = False
    numbers: ClassVar[Numbers] = "none"

    def encode(self, codec: Codec, rows: torch.Tensor, squares: torch.Tensor | None) -> torch.Tensor:
        """As :class:`~llmconvert.quantize.methods.base.GgmlQuantizer` says."""
        return torch.from_numpy(codec.encode(rows.numpy(), None if squares is None else squares.numpy()))


def mean_squares(name: str, inputs: Iterable[torch.Tensor], columns: int) -> torch.Tensor:
    """Mean square of each column of a linear's inputs, summed in float64.

    Args:
        name: of the linear, for errors.
        inputs: ``[tokens, columns]`` each.

    Returns:
        float32 ``[columns]``.

    Raises:
        CalibrationError: they are not finite.
    """
    total, tokens = torch.zeros(columns, dtype=torch.float64), 0
    for rows in inputs:
        total += rows.float().square().sum(0, dtype=torch.float64).cpu()
        tokens += len(rows)
    mean = (total / max(tokens, 1)).float()
    if not torch.isfinite(mean).all():
        raise CalibrationError(f"{name}: its calibration inputs are not finite")
    return mean
