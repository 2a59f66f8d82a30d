"""Quantized tensors whose codes a GGUF type can hold as they are: groups of 32 with one scale, in 4 or 8 bits."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.blocks import Array, Blocks
from llmconvert.gguf.ggml.q4_0 import CODEC as Q4_0
from llmconvert.gguf.ggml.q8_0 import CODEC as Q8_0
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["CARRIED", "carry_over"]

#: Scheme → tensor type that holds its codes and scales exactly.
CARRIED: Final = {"w4a16-g32-sym": "Q4_0", "w8a16-g32-sym": "Q8_0"}


def carried_type(scheme: Scheme) -> str | None:
    """The tensor type that holds a scheme's codes; None if none does."""
    return CARRIED.get(str(scheme))


def carry_over(name: str, tensor: QuantizedTensor) -> Array:
    """A quantized tensor's bytes in its :data:`CARRIED` type, uint8 ``[rows, row bytes]``; nothing is rounded.

    Raises:
        UnsupportedError: a scale is too large or too small for float16.
    """
    scale = tensor.scale.to(torch.float16)
    if not torch.equal(scale.to(tensor.scale.dtype), tensor.scale):
        raise UnsupportedError(f"{name}: its scales do not fit float16, which GGUF stores them in; quantize it anew")
    codes = tensor.codes.numpy().reshape(-1, 32)
    scales: Array = scale.numpy().reshape(-1)
    if str(tensor.scheme) == "w4a16-g32-sym":
        raw = Q4_0.pack(Blocks((codes + 8).astype(np.uint8), scales))
    else:
        raw = Q8_0.pack(Blocks(codes, scales))
    return raw.reshape(tensor.shape[0], -1)
