"""What a quantization method is to the engine, and the table of those there are."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llmconvert.engine.statistics import Hessian
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["METHODS", "Quantizer", "Solution", "Target", "load_method", "needs_calibration"]

#: Method name → where its class lies; loaded on use.
METHODS: Mapping[str, str] = {
    "rtn": "llmconvert.quantize.rtn:Rtn",
    "gptq": "llmconvert.quantize.gptq:Gptq",
}


@dataclass(frozen=True, slots=True)
class Target:
    """A weight to quantize: its linear's name, values ``[rows, columns]`` in any floating dtype, and its scheme."""

    name: str
    weight: torch.Tensor
    scheme: Scheme


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight, and what its method knows about it.

    Attributes:
        tensor: the weight.
        error: squared error of the linear's output over its squared output, on the calibration inputs; None if the
            method has none.
        damping: share of the mean diagonal that the Hessian needed; None without one.
    """

    tensor: QuantizedTensor
    error: float | None = None
    damping: float | None = None


class Quantizer(Protocol):
    """A method: statistics and weights in, codes out."""

    #: Whether :meth:`quantize` wants the Hessian of the linears' inputs.
    needs_hessian: bool

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        """Quantize linears that share one input; ``hessian`` is theirs to overwrite.

        Raises:
            CheckpointError: a weight is not finite.
            CalibrationError: the statistics are unusable.
        """

    def nbytes(self, rows: int, columns: int) -> int:
        """Peak bytes of :meth:`quantize` beside the weights and the Hessian, for ``rows`` in all."""


def load_method(name: str, options: Mapping[str, Any]) -> Quantizer:
    """The method of that name with its options.

    Raises:
        UnsupportedError: there is none of that name, or it has no such option.
    """
    if name not in METHODS:
        raise UnsupportedError(f"method {name!r} is not known; known are {', '.join(METHODS)}")
    module, _, attribute = METHODS[name].partition(":")
    try:
        instance: Quantizer = getattr(importlib.import_module(module), attribute)(**options)
    except TypeError as error:
        raise UnsupportedError(f"method {name!r}: {error}") from error
    return instance


def needs_calibration(name: str) -> bool:
    """Whether a method needs calibration text."""
    return load_method(name, {}).needs_hessian
