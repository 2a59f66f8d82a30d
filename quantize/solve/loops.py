"""What the loops over columns take, and where they run."""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from llmconvert.quantize.numbers import Number

__all__ = ["gpu_kernels", "levels_of"]


def levels_of(number: Number, like: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """What codes of a number stand for, as the kernels take it, in the dtype of what they work on: their last four
    arguments."""
    if number.parts is not None:
        parts = number.parts
        codes = torch.arange(1 << parts.bits, dtype=torch.int32)
        return parts.values(codes).to(like), parts.bits, parts.mantissa, parts.least
    table = number.table
    return like.new_empty(0) if table is None else table.to(like), 0, 0, 0


def gpu_kernels(values: torch.Tensor) -> ModuleType | None:
    """:mod:`~llmconvert.quantize.solve.triton_kernels`, if ``values`` are float32 on a GPU and Triton is installed."""
    return _triton_kernels() if values.is_cuda and values.dtype == torch.float32 else None


@functools.cache
def _triton_kernels() -> ModuleType | None:
    try:
        from llmconvert.quantize.solve import triton_kernels
    except ImportError:  # torch brings Triton along where there are GPUs for it
        return None
    return triton_kernels
