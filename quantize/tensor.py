"""The canonical quantized weight: unpacked integer codes with scales and zero points.

Algorithms produce it, formats pack it, readers dequantize it: ``w = (code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmconvert.quantize.scheme import Scheme

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight of shape ``[rows, columns]`` as codes.

    Attributes:
        codes: int8 ``[rows, columns]``, in ``scheme.code_min … scheme.code_max`` (signed, also when asymmetric).
        scale: ``[rows, groups]`` in the dtype the format stores, so that what an algorithm saw is what is written.
        zero: int8 ``[rows, groups]`` in the range of the codes, or None for symmetric schemes.
        scheme: bits, grouping and symmetry.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        expected = (rows, self.scheme.groups(columns))
        if self.codes.dtype != torch.int8:
            raise ValueError(f"codes must be int8, found {self.codes.dtype}")
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale must have shape {expected}, found {tuple(self.scale.shape)}")
        if (self.zero is None) != self.scheme.symmetric:
            raise ValueError(f"scheme {self.scheme} {'has no' if self.scheme.symmetric else 'needs a'} zero point")
        if self.zero is not None and (tuple(self.zero.shape) != expected or self.zero.dtype != torch.int8):
            raise ValueError(f"zero must be int8 {expected}, found {self.zero.dtype} {tuple(self.zero.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the weight."""
        rows, columns = self.codes.shape
        return rows, columns

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The rows ``start:stop``, sharing memory."""
        zero = None if self.zero is None else self.zero[start:stop]
        return QuantizedTensor(self.codes[start:stop], self.scale[start:stop], zero, self.scheme)

    @classmethod
    def concatenate(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Tensors of one scheme and width, one below the other."""
        if len(parts) == 1:
            return parts[0]
        zeros = [part.zero for part in parts if part.zero is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            parts[0].scheme,
        )

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight these codes stand for, ``[rows, columns]``, computed in float32 and rounded once to ``dtype``."""
        rows, columns = self.codes.shape
        grouped = self.codes.reshape(rows, self.scale.shape[1], -1).float()
        if self.zero is not None:
            grouped -= self.zero.unsqueeze(-1).float()
        grouped *= self.scale.unsqueeze(-1).float()
        return grouped.reshape(rows, columns).to(dtype)
