"""F32, F16 and BF16: tensor types of one value per block, which keep the weights as floats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmconvert.gguf.ggml.blocks import Array

__all__ = ["BF16", "F16", "F32", "Plain"]


@dataclass(frozen=True, slots=True)
class Plain:
    """A float type; rounds to nearest, ties to even."""

    name: str
    dtype: torch.dtype
    size: int = 1

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize

    def encode(self, values: Array, importance: Array | None = None) -> Array:
        cast = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.dtype)
        raw: Array = cast.view(torch.uint8).numpy()
        return raw

    def decode(self, raw: Array) -> Array:
        values: Array = torch.from_numpy(np.array(raw)).view(self.dtype).float().numpy()
        return values


F32 = Plain("F32", torch.float32)
F16 = Plain("F16", torch.float16)
BF16 = Plain("BF16", torch.bfloat16)
