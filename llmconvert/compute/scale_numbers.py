"""Scales that are numbers of 8 bits themselves: powers of two (E8M0), and E4M3 below a float32 scale of the tensor.

Sources: OCP Microscaling Formats 1.0 (arXiv 2310.10537) for E8M0; NVIDIA's NVFP4 (arXiv 2509.25149) for E4M3.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # numbers, and so the names of schemes, are known before torch is loaded
    import torch

__all__ = ["E4M3_SCALES", "E8M0", "ScaleNumber"]

# Of float32: the width of its mantissa, the bits of 2⁻¹²⁷, which is below its normal numbers, and those of NaN.
_MANTISSA, _SMALLEST_POWER, _NAN = 23, 1 << 22, 0x7FC00000


class ScaleNumber(ABC):
    """What scales are stored as where they are numbers of few bits.

    Attributes:
        shared: whether a float32 scale of the whole tensor goes with them, for what their range lacks.
    """

    shared: bool

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """What a file holds them in."""

    @abstractmethod
    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What stored scales stand for, float32 of the same shape."""

    @abstractmethod
    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """Positive scales as they are stored, in :attr:`dtype`: rounded to one there is."""


@dataclass(frozen=True, slots=True)
class _Exponents(ScaleNumber):
    """E8M0: powers of two from 2⁻¹²⁷ to 2¹²⁷, as their exponents plus 127; 255 is NaN."""

    shared: bool = False

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.uint8

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        # Bits of float32, so that no power is computed, nor lost below the normal numbers.
        exponents = codes.view(torch.uint8).int()
        bits = exponents << _MANTISSA
        bits = bits.masked_fill_(exponents == 0, _SMALLEST_POWER).masked_fill_(exponents == 255, _NAN)
        return bits.view(torch.float32)

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        """The power of two at or above, so that nothing a scale covers is cut off."""
        import torch

        mantissa, exponent = torch.frexp(scale.float())
        return (exponent - (mantissa == 0.5).int() + 127).clamp_(0, 254).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class _SmallFloats(ScaleNumber):
    """Floats that torch has a dtype for."""

    shared: bool = True

    @property
    def dtype(self) -> torch.dtype:
        import torch

        return torch.float8_e4m3fn

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float()

    def nearest(self, scale: torch.Tensor) -> torch.Tensor:
        import torch

        return scale.clamp(max=torch.finfo(self.dtype).max).to(self.dtype)


#: Powers of two, one for a group of 32 (MX).
E8M0 = _Exponents()

#: One for a group of 16, below a float32 scale of the whole tensor (NVFP4).
E4M3_SCALES = _SmallFloats()
