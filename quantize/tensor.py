"""The canonical quantized weight: unpacked codes with scales and zero points.

Algorithms produce it, formats pack it, readers dequantize it: ``w = (value of code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmconvert.quantize.numbers import dynamic_levels
from llmconvert.quantize.scheme import Scheme

__all__ = ["NESTED_GROUP", "NestedScales", "QuantizedTensor", "scaled"]

#: Scales that share a scale of their own.
NESTED_GROUP = 256
# bitsandbytes divides by no less.
_SMALLEST = 1e-38
_STEPS = 65_535


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales that are quantized themselves: the double quantization of QLoRA, bit for bit as bitsandbytes has it.

    Less their mean, they are quantized :data:`NESTED_GROUP` at a time to 8-bit dynamic floats.

    Attributes:
        codes: uint8 ``[rows · groups]``, one per scale of the flattened weight.
        absmax: float32, one per 256 codes.
        offset: float32 scalar tensor, added to all of them.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def quantize(cls, scale: torch.Tensor) -> NestedScales:
        """Quantize scales, float32 of any shape; flattened."""
        offset = scale.mean()
        centred = (scale - offset).reshape(-1)
        padded = torch.nn.functional.pad(centred, (0, -len(centred) % NESTED_GROUP)).view(-1, NESTED_GROUP)
        absmax = padded.abs().amax(-1)
        levels = dynamic_levels(scale.device)
        values = padded * (1.0 / absmax.clamp(min=_SMALLEST)).unsqueeze(-1)
        # bitsandbytes looks levels up in a table of 2¹⁶ steps; what lies next to a middle falls where its step does.
        values = torch.floor((values + 1) * 0.5 * _STEPS + 0.5) / _STEPS * 2 - 1
        middles = (levels[1:] + levels[:-1]) / 2
        codes = torch.bucketize(values, middles).where(absmax.unsqueeze(-1) > 0, 0).to(torch.uint8)
        return cls(codes.view(-1)[: len(centred)].contiguous(), absmax, offset)

    def dequantize(self) -> torch.Tensor:
        """The scales that were quantized, float32 ``[rows · groups]``."""
        values = dynamic_levels(self.codes.device)[self.codes.int()]
        return values * self.absmax.repeat_interleave(NESTED_GROUP)[: len(values)] + self.offset


def scaled(values: torch.Tensor, scale: torch.Tensor, size: int) -> torch.Tensor:
    """Values times their scales, in place.

    Args:
        values: float32 ``[rows, columns]``, contiguous.
        scale: float32 ``[rows, groups]`` or ``[1, groups]``.
        size: columns per group; the last group may be cut off.
    """
    whole, rest = divmod(values.shape[1], size)
    values[:, : whole * size].unflatten(1, (whole, size)).mul_(scale[:, :whole].unsqueeze(-1))
    if rest:
        values[:, whole * size :].mul_(scale[:, whole:])
    return values


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """A weight of shape ``[rows, columns]`` as codes.

    Attributes:
        codes: ``[rows, columns]`` in the number's ``code_dtype``: int8, signed also when there are zero points, or E4M3
            floats.
        scale: ``[rows, groups]`` (of blocks: see :meth:`~llmconvert.quantize.scheme.Scheme.scale_shape`) in the dtype
            the format stores, so that what an algorithm saw is what is written; where it stores numbers of 8 bits, what
            they stand for, float32.
        zero: int8 ``[rows, groups]`` in the range of the codes, or None for symmetric schemes.
        scheme: number and grouping.
        nested: what ``scale`` is stored as, for schemes that quantize it too; None for all others.
        divisor: float32, one number: what all scales are divided by, where they are stored as numbers that share one
            (:attr:`~llmconvert.quantize.numbers.ScaleNumber.shared`); None for all others.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    scheme: Scheme
    nested: NestedScales | None = None
    divisor: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, columns = self.codes.shape
        expected = self.scheme.scale_shape(rows, columns)
        held_in = self.scheme.number.code_dtype
        if self.codes.dtype != held_in:
            raise ValueError(f"codes must be {str(held_in)[6:]}, found {self.codes.dtype}")
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale must have shape {expected}, found {tuple(self.scale.shape)}")
        if (self.zero is None) != self.scheme.symmetric:
            raise ValueError(f"scheme {self.scheme} {'has no' if self.scheme.symmetric else 'needs a'} zero point")
        if self.zero is not None and (tuple(self.zero.shape) != expected or self.zero.dtype != torch.int8):
            raise ValueError(f"zero must be int8 {expected}, found {self.zero.dtype} {tuple(self.zero.shape)}")
        if (self.nested is not None) != self.scheme.nested:
            raise ValueError(f"scheme {self.scheme} {'needs' if self.scheme.nested else 'has no'} nested scales")
        scales = self.scheme.number.scales
        if (self.divisor is not None) != (scales is not None and scales.shared):
            raise ValueError(f"scheme {self.scheme} {'has no' if self.divisor is not None else 'needs a'} divisor")

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, columns)`` of the weight."""
        rows, columns = self.codes.shape
        return rows, columns

    def rows(self, start: int, stop: int) -> QuantizedTensor:
        """The rows ``start:stop``, sharing memory; of blocks whole ones. Nested scales cannot be cut: they run over all
        rows."""
        zero = None if self.zero is None else self.zero[start:stop]
        size = self.scheme.rows or self.codes.shape[0]
        if start % size:
            raise ValueError(f"row {start} lies inside a block of {size}")
        scale = self.scale[start // size : -(-stop // size)]
        return QuantizedTensor(self.codes[start:stop], scale, zero, self.scheme, divisor=self.divisor)

    @classmethod
    def concatenate(cls, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """Tensors of one scheme and width, one below the other."""
        if len(parts) == 1:
            return parts[0]
        if parts[0].scheme.rows != 1 or parts[0].divisor is not None:
            raise ValueError(f"tensors in {parts[0].scheme} have scales that rows share; they can't be joined")
        zeros = [part.zero for part in parts if part.zero is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            parts[0].scheme,
        )

    @property
    def factors(self) -> torch.Tensor:
        """What a code's value is multiplied by: float32 in the shape of ``scale``."""
        return self.scale.float() if self.divisor is None else self.scale.float() / self.divisor

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight these codes stand for, ``[rows, columns]``, computed in float32 and rounded once to ``dtype``."""
        rows, columns = self.codes.shape
        if self.scheme.rows != 1 or self.scheme.number.scales is not None:
            factors = self.factors.repeat_interleave(self.scheme.rows or rows, dim=0)[:rows]
            values = self.scheme.number.values(self.codes)
            return scaled(values, factors, self.scheme.columns_per_group(columns)).to(dtype)
        grouped = self.scheme.number.values(self.codes).reshape(rows, self.scale.shape[1], -1)
        if self.zero is not None:
            grouped -= self.zero.unsqueeze(-1).float()
        grouped *= self.scale.unsqueeze(-1).float()
        return grouped.reshape(rows, columns).to(dtype)
