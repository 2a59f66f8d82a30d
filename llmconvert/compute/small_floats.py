"""Floats of few bits by their parts, E4M3 and E2M1: rounded half to even, to codes of sign, exponent and mantissa.

Sources: OCP 8-bit floating point (arXiv 2209.05433) for E4M3; OCP Microscaling Formats 1.0 (arXiv 2310.10537) for E2M1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numbers, and so the names of schemes, are known before torch is loaded
    import torch

__all__ = ["E2M1_PARTS", "E4M3_PARTS", "FloatParts"]


@dataclass(frozen=True, slots=True)
class FloatParts:
    """A kind of small floats.

    Attributes:
        bits: of a code, the sign's included; it is the upper one.
        mantissa: bits of the mantissa.
        least: exponent of the smallest normal number.
        largest: value.
    """

    bits: int
    mantissa: int
    least: int
    largest: float

    def spacing(self, values: torch.Tensor) -> torch.Tensor:
        """How far a value's neighbours are from each other, where it lies: float32 of the same shape."""
        import torch

        return torch.exp2(self._exponent(values.float()).float() - self.mantissa)

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The values next to some, float32; what is beyond the range becomes its end, zeros keep their sign."""
        values = values.float().clamp(-self.largest, self.largest)
        spacing = self.spacing(values)
        return (values / spacing).round_().mul_(spacing)

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """The codes next to values, int32: their bits as a number without a sign."""
        import torch

        values = values.float().clamp(-self.largest, self.largest)
        exponent = self._exponent(values)
        steps = (values.abs() / torch.exp2(exponent.float() - self.mantissa)).round_().int()
        # A step up from the last mantissa is the first one of the next exponent.
        magnitude = ((exponent - self.least) << self.mantissa) + steps
        return magnitude + (torch.signbit(values).int() << (self.bits - 1))

    def _exponent(self, values: torch.Tensor) -> torch.Tensor:
        """Of float32 values the exponent that their code has, int32."""
        import torch

        _, exponent = torch.frexp(values)
        return (exponent - 1).masked_fill_(values == 0, self.least).clamp_(min=self.least)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for, float32; the inverse of :meth:`codes`."""
        import torch

        codes = codes.int() & ((1 << self.bits) - 1)
        magnitude = codes & ((1 << (self.bits - 1)) - 1)
        exponent, mantissa = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        # Below the first exponent numbers have no leading one.
        steps = mantissa + ((exponent > 0).int() << self.mantissa)
        sizes = torch.ldexp(steps.float(), (exponent - 1).clamp_(min=0) + (self.least - self.mantissa))
        return torch.where(codes > magnitude, -sizes, sizes)


#: Four exponent and three mantissa bits, no infinity.
E4M3_PARTS = FloatParts(8, 3, -6, 448.0)

#: Two exponent bits and one of mantissa: 0, ½, 1, 1½, 2, 3, 4, 6.
E2M1_PARTS = FloatParts(4, 1, 0, 6.0)
