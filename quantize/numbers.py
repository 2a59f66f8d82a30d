"""Number formats of weights, before any scale: integers of k bits, E4M3, E2M1, NF4, FP4, the integers of LLM.int8.

A number says how many bits a code has, what codes stand for as multiples of their scale, how a value is rounded to one,
and which scales it takes: floats of any kind, or numbers of few bits themselves
(:class:`~llmconvert.compute.scale_numbers.ScaleNumber`). Whatever rounds, solves, packs or reads weights asks it, so
that one more number is one more value here, or one more class if its codes are of another sort.

Sources: OCP 8-bit floating point (arXiv 2209.05433) for E4M3; OCP Microscaling Formats 1.0 (arXiv 2310.10537) for E2M1,
E8M0 and their groups of 32; NVIDIA's NVFP4 (arXiv 2509.25149) for E2M1 in groups of 16 with scales in E4M3;
QLoRA (Dettmers et al. 2023, arXiv 2305.14314) for NF4; LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339); bitsandbytes
(https://github.com/bitsandbytes-foundation/bitsandbytes) for FP4, and bit for bit for the rounding of its three.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a scheme's name is read, and refused, before torch is loaded
    import torch

from llmconvert.compute.scale_numbers import E4M3_SCALES, E8M0, ScaleNumber
from llmconvert.compute.small_floats import E2M1_PARTS, E4M3_PARTS, FloatParts

__all__ = [
    "AFFINE",
    "E4M3",
    "FP4",
    "LEAST_MAGNITUDE",
    "LLM_INT8",
    "MXFP4",
    "MXFP8",
    "NAMED",
    "NF4",
    "NVFP4",
    "E2M1Number",
    "Float",
    "Int",
    "Levels",
    "Number",
    "Whole",
    "dtype_named",
]

#: Of a group; bitsandbytes divides by no less.
LEAST_MAGNITUDE = 1e-38


@dataclass(frozen=True, slots=True)
class Number(ABC):
    """What a code of so many bits stands for.

    Attributes:
        bits: width of a code, 2 to 8.
        symmetric: whether there are no zero points: zero is a code's value itself.
        name: what the names of schemes call it.
        grouped: whether its scales are of groups of columns, or of whole output channels if False; either if None.
        activations: bits that the activations beside it can have.
        absmax: whether a group's scale is its largest magnitude over :attr:`largest` in float32, and nothing else will
            do: the numbers of bitsandbytes.
        rounded_from: for these, what weights are rounded to first: the name of one of torch's dtypes.
        nestable: whether its scales can be quantized themselves.
        blocks: whether rows can share scales: those of a block, or all of a tensor.
        scales: what its scales are stored as; None for floats of the format's choice.
        minima: whether each group has a float beside its scale, which is added to its values.
    """

    bits: int
    symmetric: bool = True
    name: str = "int"
    grouped: bool | None = None
    activations: tuple[int, ...] = (16, 8)
    absmax: bool = False
    rounded_from: str = "float32"
    nestable: bool = False
    blocks: bool = False
    scales: ScaleNumber | None = None
    minima: bool = False

    @property
    def code_dtype(self) -> torch.dtype:
        """What codes are held in."""
        import torch

        return torch.int8

    @property
    def words(self) -> str:
        """What it is, for people."""
        return f"{self.bits}-bit {_WORDS.get(self.name, self.name)}"

    @property
    @abstractmethod
    def limits(self) -> tuple[float, float]:
        """The smallest and the largest value of a code; of integers the codes themselves, zero points not taken off."""

    @property
    def largest(self) -> float:
        """What a group's largest magnitude comes to when the scale covers the group, without zero points."""
        return self.limits[1]

    @property
    def widest(self) -> float:
        """Up to how many times the scale that covers a group is worth trying: levels may be finer below the largest."""
        return 1.0

    @property
    def even(self) -> bool:
        """Whether codes are integers that stand for themselves, under any scale."""
        return False

    @property
    def table(self) -> torch.Tensor | None:
        """What codes stand for, float32 and ascending, where they are indices and any scale will do; else None."""
        return None

    @property
    def parts(self) -> FloatParts | None:
        """What sort of small floats codes are, if they are such."""
        return None

    @property
    def solvable(self) -> bool:
        """Whether solvers can round to it under scales of their own choice: integers, tables of levels, floats."""
        return self.even or self.table is not None or self.parts is not None

    @property
    def stored(self) -> Number:
        """The number that its codes and scales are read as, once they are there."""
        return self

    @abstractmethod
    def nearest(self, values: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        """The code next to each value.

        Args:
            values: weights over their scales, any floating dtype.
            zero: what codes are moved by, broadcast to ``values``; None for none, as for all but integers.

        Returns:
            codes of the same shape, in :attr:`code_dtype`.
        """

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for as multiples of their scale, float32; zero points are not taken off."""
        return codes.float()

    def round_scale(self, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Scales as they can be stored, in the dtype that a format stores; numbers of 8 bits as float32."""
        return scale.to(dtype) if self.scales is None else self.scales.values(self.scales.nearest(scale))

    def round_groups(self, grouped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of an :attr:`absmax` number, as bitsandbytes has them.

        It multiplies by :attr:`largest` over a group's magnitude, where others divide by the scale: near ties that
        makes a difference.

        Args:
            grouped: weights ``[rows, groups, group size]``, any floating dtype.

        Returns:
            codes of that shape, and scales float32 ``[rows, groups]``: zero where a group is, and not finite where
            :attr:`rounded_from` does not hold its values.
        """
        values = grouped.to(dtype_named(self.rounded_from))
        magnitude = values.abs().amax(-1, keepdim=True).float()
        codes = self.nearest((values * (self.largest / magnitude.clamp(min=LEAST_MAGNITUDE))).where(magnitude > 0, 0))
        # By a tensor: a GPU multiplies by the inverse of a number, which is off by a bit.
        return codes, (magnitude / magnitude.new_tensor(self.largest)).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Int(Number):
    """Integers, signed whether or not there are zero points, as in compressed-tensors.

    Attributes:
        narrow: whether the smallest code goes unused, so that the range is symmetric.
    """

    narrow: bool = False

    @property
    def limits(self) -> tuple[float, float]:
        half = 1 << (self.bits - 1)
        return float(self.narrow - half), float(half - 1)

    @property
    def largest(self) -> float:
        """Half the range of all codes, −8 … 7 being 15 steps wide, as compressed-tensors has it."""
        low, high = self.limits
        return (high - low) / 2

    @property
    def words(self) -> str:
        return f"{self.bits}-bit integers{'' if self.symmetric else ' with zero points'}"

    @property
    def even(self) -> bool:
        return not self.absmax

    @property
    def stored(self) -> Number:
        return Int(self.bits, self.symmetric)

    def nearest(self, values: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        """Half to even."""
        codes = values.round()
        if zero is not None:
            codes += zero
        return codes.clamp_(*self.limits).to(self.code_dtype)


@dataclass(frozen=True, slots=True)
class Whole(Number):
    """Integers from zero up, which a float of the group's is added to: GGML's types with minima, MLX's affine."""

    minima: bool = True

    @property
    def code_dtype(self) -> torch.dtype:
        """Unsigned where the sign's bit is needed."""
        return dtype_named("int8" if self.bits < 8 else "uint8")

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, float((1 << self.bits) - 1)

    @property
    def even(self) -> bool:
        return True

    def nearest(self, values: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        """Half to even."""
        return values.round().clamp_(*self.limits).to(self.code_dtype)


@dataclass(frozen=True, slots=True)
class Float(Number):
    """Small floats that torch has a dtype for.

    Attributes:
        dtype: what codes are held in: the name of one of torch's dtypes.
    """

    dtype: str = "float8_e4m3fn"

    @property
    def code_dtype(self) -> torch.dtype:
        return dtype_named(self.dtype)

    @property
    def limits(self) -> tuple[float, float]:
        import torch

        bound = torch.finfo(self.code_dtype).max
        return -bound, bound

    @property
    def parts(self) -> FloatParts | None:
        return E4M3_PARTS

    def nearest(self, values: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        return values.clamp(*self.limits).to(self.code_dtype)


@dataclass(frozen=True, slots=True)
class E2M1Number(Number):
    """4-bit floats of two exponent bits and one of mantissa: 0, ½, 1, 1½, 2, 3, 4, 6; the upper bit is the sign."""

    @property
    def limits(self) -> tuple[float, float]:
        return -E2M1_PARTS.largest, E2M1_PARTS.largest

    @property
    def widest(self) -> float:
        """A group may reach to 4 instead of 6, below which levels are half as far from each other."""
        return 1.5

    @property
    def parts(self) -> FloatParts | None:
        return E2M1_PARTS

    def nearest(self, values: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        """Half to even; what is beyond the range becomes its end."""
        import torch

        return E2M1_PARTS.codes(values).to(torch.int8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        return E2M1_PARTS.values(codes)


@dataclass(frozen=True, slots=True)
class Levels(Number):
    """Codes are indices into a table.

    Attributes:
        levels: the value of every code, in any order.
    """

    levels: tuple[float, ...] = ()

    @property
    def limits(self) -> tuple[float, float]:
        return min(self.levels), max(self.levels)

    @property
    def table(self) -> torch.Tensor | None:
        import torch

        ascending = all(low < high for low, high in itertools.pairwise(self.levels))
        free = not self.absmax and self.scales is None
        return torch.tensor(self.levels, dtype=torch.float32) if ascending and free else None

    def nearest(self, values: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        """Between two levels the lower one wins a tie."""
        import torch

        levels, order = torch.tensor(self.levels, dtype=torch.float32, device=values.device).sort()
        middles = (levels[1:] + levels[:-1]) / 2
        return order[torch.bucketize(values.float(), middles)].to(torch.int8)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.tensor(self.levels, dtype=torch.float32, device=codes.device)[codes.int()]


def dtype_named(name: str) -> torch.dtype:
    """One of torch's dtypes by its name, ``float16`` for example."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


#: Four exponent and three mantissa bits, no infinity, largest value 448.
E4M3 = Float(8, name="fp8", blocks=True)

# Of floats and levels, by name.
_WORDS = {
    "affine": "integers, a float scale and bias",
    "fp8": "floats (E4M3)",
    "nvfp4": "floats (E2M1), scales in E4M3",
    "mxfp4": "floats (E2M1), scales powers of two",
    "mxfp8": "floats (E4M3), scales powers of two",
    "nf4": "levels (NF4)",
    "fp4": "floats (FP4 of bitsandbytes)",
}

#: E2M1 in groups of 16, whose scales are E4M3 below a float32 scale of the whole tensor.
NVFP4 = E2M1Number(4, name="nvfp4", grouped=True, activations=(16, 4), scales=E4M3_SCALES)

#: E2M1 in groups of 32, whose scales are powers of two.
MXFP4 = E2M1Number(4, name="mxfp4", grouped=True, activations=(16, 8, 4), scales=E8M0)

#: E4M3 in groups of 32, whose scales are powers of two.
MXFP8 = Float(8, name="mxfp8", grouped=True, scales=E8M0)

#: Integers of −127 … 127, of which a row's largest magnitude is the last; weights are rounded to float16 first.
LLM_INT8 = Int(8, name="absmax", grouped=False, activations=(8,), absmax=True, rounded_from="float16", narrow=True)

#: The 16 values of NF4, quantiles of a normal distribution scaled to −1 … 1, as bitsandbytes has them.
NF4 = Levels(
    4,
    name="nf4",
    grouped=True,
    activations=(16,),
    absmax=True,
    nestable=True,
    levels=(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)

_FP4_SIZES = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)

#: The 4-bit floats of bitsandbytes, over their largest; the upper bit is the sign.
FP4 = Levels(
    4,
    name="fp4",
    grouped=True,
    activations=(16,),
    absmax=True,
    nestable=True,
    levels=(*_FP4_SIZES, *(-size for size in _FP4_SIZES)),
)

#: Integers of any width, of which a group's scale and bias are floats of the model's dtype, as MLX has them.
AFFINE = Whole(4, name="affine", grouped=True, activations=(16,))

#: Those that schemes have a word for beside integers, by that word; FP4 is read alone.
NAMED: Mapping[str, Number] = {one.name: one for one in (E4M3, NF4, LLM_INT8, NVFP4, MXFP4, MXFP8, AFFINE)}
