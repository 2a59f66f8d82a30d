"""Dynamic activation quantization, one scale per token, as runtimes do it before each linear.

What is computed are the values the codes stand for, in the dtype of the input: the product that follows then equals
that of an integer or E4M3 kernel up to the rounding of its sums. The formula is compressed-tensors' (symmetric, the
largest magnitude of a token at the middle between the two outermost codes, everything in the input's dtype).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

__all__ = ["InputKind", "quantize_input", "quantize_inputs_of"]

InputKind = Literal["int8", "fp8"]

_FP8 = torch.float8_e4m3fn
# Half the range of all codes, and the range itself.
_HALF_RANGE = {"int8": 127.5, "fp8": torch.finfo(_FP8).max}


def quantize_input(values: torch.Tensor, kind: InputKind) -> torch.Tensor:
    """Round activations to what their codes stand for.

    Args:
        values: ``[…, columns]``, one token per row of the last dimension.
        kind: of the codes.

    Returns:
        the same shape and dtype.
    """
    largest = values.abs().amax(-1, keepdim=True)
    scale = largest / _HALF_RANGE[kind]
    scale = torch.where(scale == 0, torch.finfo(values.dtype).eps, scale)
    codes = values / scale
    if kind == "int8":
        return codes.round_().clamp_(-128, 127).mul_(scale)
    bound = torch.finfo(_FP8).max
    return codes.clamp_(-bound, bound).to(_FP8).to(values.dtype).mul_(scale)


def quantize_inputs_of(linear: nn.Linear, kind: InputKind) -> None:
    """Let a linear see its inputs quantized from here on."""

    def replace(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantize_input(args[0], kind), *args[1:])

    linear.register_forward_pre_hook(replace)
